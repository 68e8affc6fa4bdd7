"""Encoders for readers to read, small enough to be trained in a test."""

from torch import nn

from tiltlens.units import Encoder, register_encoder


def register_small_net(name: str) -> None:
    """3 outputs, and 6 channels in layer 0, of images of 8 pixels."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 3))
    register_encoder(Encoder(net, 8, name=name))
