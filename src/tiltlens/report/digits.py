"""Numbers as a reader wants them: as many digits as the standard error supports."""

import math

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits; an en dash where there is no number.

    >>> number(0.123456), number(-26000.4), number(1.5e7), number(None), number(8.0)
    ('0.123', '−26000', '1.5 × 10⁷', '–', '8')
    """
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 6:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa} × 10{_raised(int(power))}".replace("-", "−")
    if exponent >= digits:
        return f"{value:.0f}".replace("-", "−")
    text = f"{value:.{max(digits - 1 - exponent, 0)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def plus_minus(value: float | None, se: float | None) -> str:
    r"""value ± se, cut where the error begins: two digits of an error that starts with 1, else one.

    >>> plus_minus(3.14159, 0.0213), plus_minus(1234.5, 87), plus_minus(2.5, None)
    ('3.14\xa0±\xa00.02', '1230\xa0±\xa090', '2.5')
    """
    if value is None or not math.isfinite(value):
        return NONE
    if not se or not math.isfinite(se):
        return number(value)
    exponent = math.floor(math.log10(abs(se)))
    places = -exponent + (1 if abs(se) / 10**exponent < 1.95 else 0)
    if places > 6 or abs(value) >= 1e6:
        return f"{number(value)}\xa0±\xa0{number(se, 1)}"
    rounded, error = round(value, places) + 0.0, round(se, places)
    shown = max(places, 0)
    return f"{rounded:.{shown}f}\xa0±\xa0{error:.{shown}f}".replace("-", "−")


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
