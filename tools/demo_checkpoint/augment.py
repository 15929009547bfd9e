"""Make a clean rendering sound like a recording: telephone bands, rooms, levels, noise, clipping."""

import random

import numpy as np
import torch
from bank import SAMPLE_RATE
from scipy.signal import butter, fftconvolve, sosfilt
from sounds import NumpyRandom


def _filter(pcm: np.ndarray, order: int, hz: float | list[float], kind: str) -> np.ndarray:
    return sosfilt(butter(order, hz, kind, fs=SAMPLE_RATE, output="sos"), pcm).astype(np.float32)


def _echo(rng: random.Random, noise: NumpyRandom, longest_s: float) -> np.ndarray:
    frames = int(rng.uniform(0.03, longest_s) * SAMPLE_RATE)
    return noise.randn(frames) * np.exp(-np.arange(frames) / (frames / 5))


def augment(rng: random.Random, noise: NumpyRandom, pcm: np.ndarray, clean: float) -> np.ndarray:
    """Vary a sample for the first two stages; a share `clean` of them stays as it is."""
    if rng.random() < clean:
        return pcm
    if rng.random() < 0.3:
        pcm = _filter(pcm, 4, [rng.uniform(80, 350), rng.uniform(3000, 3800)], "bandpass")
    elif rng.random() < 0.3:
        pcm = _filter(pcm, 2, rng.uniform(2500, 7000), "lowpass")
    if rng.random() < 0.3:
        echo = _echo(rng, noise, 0.25)
        echo[0] = 3
        pcm = fftconvolve(pcm, echo / np.abs(echo).sum() * 2)[: len(pcm) + len(echo)].astype(np.float32)
    peak = np.abs(pcm).max()
    if peak > 1e-3:
        pcm = pcm * rng.uniform(0.15, 1.0) / (peak + 1e-6) * 0.9
    if rng.random() < 0.5:
        hiss = noise.randn(len(pcm)).astype(np.float32)
        pcm = pcm + hiss * rng.uniform(0.0002, 0.01) * max(0.05, np.abs(pcm).max())
    lead = rng.choice([0, rng.uniform(0, 0.6)])
    return np.pad(pcm, (int(lead * SAMPLE_RATE), int(rng.uniform(0, 0.5) * SAMPLE_RATE)))


def augment_hard(rng: random.Random, noise: NumpyRandom, pcm: np.ndarray) -> np.ndarray:
    """Vary a sample for the second stage."""
    if rng.random() < 0.12:
        return pcm
    draw = rng.random()
    if draw < 0.25:
        pcm = _filter(pcm, 4, [rng.uniform(80, 350), rng.uniform(3000, 3900)], "bandpass")
    elif draw < 0.45:
        pcm = _filter(pcm, 2, rng.uniform(2500, 7000), "lowpass")
    elif draw < 0.55:
        pcm = _filter(pcm, 1, rng.uniform(150, 600), "highpass")
    if rng.random() < 0.35:
        echo = _echo(rng, noise, 0.3)
        echo[0] = rng.uniform(2, 5)
        frames = len(pcm) + len(echo) // 3
        pcm = fftconvolve(pcm, echo / np.abs(echo).sum() * 2)[:frames].astype(np.float32)
    peak = np.abs(pcm).max()
    if peak > 1e-3:
        pcm = pcm * rng.uniform(0.1, 1.0) / peak * 0.95
    if rng.random() < 0.55:
        hiss = noise.randn(len(pcm) + 8).astype(np.float32)
        if rng.random() < 0.5:
            hiss = np.convolve(hiss, np.ones(8) / 3, "same").astype(np.float32)
        pcm = pcm + hiss[: len(pcm)] * rng.uniform(0.0002, 0.02) * max(0.05, min(peak, 1))
    if rng.random() < 0.1:
        pcm = np.clip(pcm * rng.uniform(1.5, 4), -1, 1)
    lead, tail = (0 if rng.random() < 0.45 else int(rng.uniform(0, 0.7) * SAMPLE_RATE) for _ in range(2))
    level = rng.choice([0, 1e-4, 1e-3])
    parts = [noise.randn(lead) * level, pcm, noise.randn(tail) * level]
    return np.concatenate(parts).astype(np.float32)


def mask_mel(mel: torch.Tensor) -> torch.Tensor:
    """Tilt the spectrum of most samples, and blank a band of some.

    Args:
        mel: float32 of shape (samples, mel bands, frames), normalised as WhisperFeatureExtractor does.

    Returns:
        The same shape.
    """
    samples, bands, _ = mel.shape
    height = torch.linspace(0, 1, bands)
    tilt = torch.zeros(samples, bands)
    for harmonic in range(4):
        phase = torch.rand(samples, 1) * 0.5
        tilt += torch.cos(torch.pi * harmonic * height[None] + phase) * torch.randn(samples, 1) * 0.06
    tilted = (torch.rand(samples, 1) < 0.6).float()
    mel = mel + (tilt * tilted)[..., None]
    mel = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 2)
    for sample in range(samples):
        if torch.rand(1) < 0.4:
            width = int(torch.randint(2, 14, (1,)))
            start = int(torch.randint(0, bands - width, (1,)))
            mel[sample, start : start + width] = mel[sample].min()
    return mel
