"""Scenes to sound: beeps, sirens, ticking and the rest by arithmetic, speech out of the bank."""

import random

import numpy as np
from bank import SAMPLE_RATE, Bank
from vocabulary import DIGITS, WORDS, Scene

NumpyRandom = np.random.RandomState


def fade(pcm: np.ndarray, frames: int = 80) -> np.ndarray:
    """Ramp both ends in place, so that they do not click."""
    frames = min(frames, len(pcm) // 2)
    if frames:
        pcm[:frames] *= np.linspace(0, 1, frames)
        pcm[-frames:] *= np.linspace(1, 0, frames)
    return pcm


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def oscillate(frequency_hz: np.ndarray) -> np.ndarray:
    """Sound a frequency given for every sample."""
    return fade(np.sin(2 * np.pi * np.cumsum(frequency_hz) / SAMPLE_RATE).astype(np.float32) * 0.5)


def tone(frequency_hz: float, seconds: float) -> np.ndarray:
    time_s = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return fade(np.sin(2 * np.pi * frequency_hz * time_s).astype(np.float32) * 0.5)


def sweep(from_hz: float, to_hz: float, seconds: float) -> np.ndarray:
    time_s = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return oscillate(from_hz * (to_hz / from_hz) ** (time_s / seconds))


def change_speed(pcm: np.ndarray, ratio: float) -> np.ndarray:
    """Play faster (ratio above 1) or slower, pitch and all."""
    return np.interp(np.arange(0, len(pcm) - 1, ratio), np.arange(len(pcm)), pcm).astype(np.float32)


def _beeps(rng: random.Random, scene: Scene) -> np.ndarray:
    beep = tone(scene.frequency_hz, rng.uniform(0.08, 0.25))
    return np.tile(np.concatenate([beep, silence(rng.uniform(0.12, 0.4))]), scene.beeps)


def _siren(rng: random.Random) -> np.ndarray:
    low, high = rng.uniform(400, 700), rng.uniform(1000, 1700)
    period, seconds = rng.uniform(0.5, 1.2), rng.uniform(2, 4)
    time_s = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return oscillate(low + (high - low) * (0.5 - 0.5 * np.cos(2 * np.pi * time_s / period)))


def _ticking(rng: random.Random, noise: NumpyRandom) -> np.ndarray:
    seconds = rng.uniform(1.5, 3.5)
    pcm = silence(seconds)
    period, at_s = rng.uniform(0.15, 0.6), 0.05
    click = (noise.randn(120) * np.exp(-np.arange(120) / 25)).astype(np.float32)
    while at_s < seconds - 0.05:
        start = int(at_s * SAMPLE_RATE)
        pcm[start : start + 120] += click
        at_s += period
    return pcm


def _melody(rng: random.Random) -> np.ndarray:
    scale = [0, 2, 4, 5, 7, 9, 11, 12]
    base_hz, seconds, notes = rng.uniform(220, 440), rng.uniform(0.15, 0.35), []
    for _ in range(rng.randint(5, 9)):
        hz = base_hz * 2 ** (rng.choice(scale) / 12)
        note = tone(hz, seconds) + 0.4 * tone(2 * hz, seconds) + 0.2 * tone(3 * hz, seconds)
        decay = np.exp(-np.arange(len(note)) / SAMPLE_RATE * rng.uniform(2, 5)).astype(np.float32)
        notes.append(note * decay)
    return np.concatenate(notes) * 0.6


def render(rng: random.Random, noise: NumpyRandom, scene: Scene) -> np.ndarray:
    """Sound a scene of any kind but speech.

    Returns:
        float32 of shape (frames,), 16 kHz, within -1 to 1 but for the peaks of noise.
    """
    if scene.kind == "beeps":
        return _beeps(rng, scene)
    if scene.kind == "siren":
        return _siren(rng)
    if scene.kind == "noise":
        pcm = noise.randn(int(rng.uniform(1, 3.5) * SAMPLE_RATE)).astype(np.float32)
        return pcm * rng.uniform(0.05, 0.25)
    if scene.kind == "tone":
        return tone(scene.frequency_hz, rng.uniform(1.2, 3.5))
    if scene.kind == "ticking":
        return _ticking(rng, noise)
    if scene.kind == "melody":
        return _melody(rng)
    if scene.kind in ("rise", "fall"):
        low, high = rng.uniform(150, 500), rng.uniform(1200, 4000)
        seconds = rng.uniform(0.8, 2.5)
        return sweep(low, high, seconds) if scene.kind == "rise" else sweep(high, low, seconds)
    if scene.kind == "silence":
        pcm = noise.randn(int(rng.uniform(1, 3) * SAMPLE_RATE)).astype(np.float32)
        return pcm * rng.choice([0, 1e-4, 5e-4])
    raise ValueError(f"no sound for the kind {scene.kind!r}")


def _floats(pcm: np.ndarray) -> np.ndarray:
    return pcm.astype(np.float32) / 32768


def speak(rng: random.Random, bank: Bank, max_words: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Draw a phrase of the bank, or single words of it strung together; change the speed of most."""
    while True:
        if max_words > 2 and rng.random() < 0.5:
            phrase = rng.choice(bank.phrases)
            pcm, words = _floats(phrase.pcm), phrase.text.split()
        else:
            pcm, words = _string(rng, bank, max_words)
        if words:
            break
    if rng.random() < 0.7:
        pcm = change_speed(pcm, rng.uniform(0.85, 1.18))
    return pcm, tuple(words)


def _string(rng: random.Random, bank: Bank, max_words: int) -> tuple[np.ndarray, list[str]]:
    count = min(max_words, rng.choice([1, 1, 2, 2, 3, 3, 4, 5, 6]))
    pool = DIGITS if rng.random() < 0.6 else WORDS
    voice = rng.choice(bank.voices)
    words, parts = [], [np.zeros(0, np.float32)]
    for _ in range(count):
        word = rng.choice(pool)
        if rng.random() < 0.05:
            voice = rng.choice(bank.voices)
        takes = bank.words.get((voice, word))
        if not takes:
            continue
        parts.append(_floats(rng.choice(takes)) * rng.uniform(0.7, 1.0))
        parts.append(silence(rng.uniform(0.02, 0.4)))
        words.append(word)
    return np.concatenate(parts), words


def speak_hard(rng: random.Random, bank: Bank) -> tuple[np.ndarray, tuple[str, ...]]:
    """Draw speech for the second stage: tight cuts, short gaps, wide tempo, human voices if there are any."""
    while True:
        if rng.random() < 0.4:
            phrase = rng.choice(bank.phrases)
            pcm, words = _floats(phrase.pcm), phrase.text.split()
        else:
            pcm, words = _hard_string(rng, bank)
        if words:
            break
    if rng.random() < 0.8:
        pcm = change_speed(pcm, rng.uniform(0.72, 1.28))
    return pcm, tuple(words)


def _hard_string(rng: random.Random, bank: Bank) -> tuple[np.ndarray, list[str]]:
    count = rng.choice([1, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6])
    pool = DIGITS if rng.random() < 0.4 else WORDS
    voice = rng.choice(bank.voices)
    if bank.humans and rng.random() < 0.3:
        pool, voice = DIGITS, rng.choice(bank.humans)
    words, parts = [], [np.zeros(0, np.float32)]
    for _ in range(count):
        word = rng.choice(pool)
        if rng.random() < 0.05:
            voice = rng.choice(bank.voices)
        takes = bank.words.get((voice, word))
        if not takes:
            continue
        part = _floats(rng.choice(takes)) * rng.uniform(0.6, 1.0)
        if rng.random() < 0.5:
            part = change_speed(part, rng.uniform(0.85, 1.18))
        if rng.random() < 0.3 and len(part) > 3000:
            head, tail = rng.randint(0, 500), rng.randint(0, 700)
            part = part[head : len(part) - tail]
        gap = rng.choice([rng.uniform(0.0, 0.1), rng.uniform(0.1, 0.5)])
        parts += [part, silence(gap)]
        words.append(word)
    return np.concatenate(parts[:-1] or parts), words
