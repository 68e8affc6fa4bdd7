"""The chain, what is done with it, and the plan of what to sample."""

from tiltlens.sampling.chain_sampler import ChainSampler, Independent
from tiltlens.sampling.noise_space import NoiseSpace
from tiltlens.sampling.particles import Particles

__all__ = ["ChainSampler", "Independent", "NoiseSpace", "Particles"]
