"""Samples without end, in batches of about equal length."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from augment import augment, augment_hard
from bank import SAMPLE_RATE, Bank
from sounds import NumpyRandom, render, speak, speak_hard
from vocabulary import Scene, ask, draw_scene

LONGEST_S = 12
POOL = 96


@dataclass
class Mix:
    """What is drawn. The stages change it while they run; samples drawn from then on follow.

    Attributes:
        kinds: The kinds of scenes, each as often as it is drawn.
        max_words: The longest string of words.
        clean: The share of samples left without augmentation; not for hard samples.
        hard: Draw speech and augmentation of the second stage.
    """

    kinds: tuple[str, ...]
    max_words: int = 6
    clean: float = 0.0
    hard: bool = False


@dataclass(frozen=True)
class Sample:
    """One recording and one question about it; `pcm` is float32, 16 kHz mono."""

    pcm: np.ndarray
    question: str
    answer: str
    scene: Scene


def draw_sample(rng: random.Random, noise: NumpyRandom, bank: Bank, mix: Mix) -> Sample:
    """Draw a scene, sound it, augment it, and ask about it."""
    kind = rng.choice(mix.kinds)
    if kind == "speech":
        pcm, words = speak_hard(rng, bank) if mix.hard else speak(rng, bank, mix.max_words)
        scene = Scene(kind, words=words)
    else:
        scene = draw_scene(rng, kind)
        pcm = render(rng, noise, scene)
    pcm = augment_hard(rng, noise, pcm) if mix.hard else augment(rng, noise, pcm, mix.clean)
    return Sample(pcm[: LONGEST_S * SAMPLE_RATE], *ask(rng, scene), scene)


def batches(seed: int, bank: Bank, mix: Mix, batch_seconds: float) -> Iterator[list[Sample]]:
    """Yield batches of at most `batch_seconds` of audio, padding counted.

    A pool of samples is drawn, sorted by length, cut into batches, and these are shuffled.
    """
    rng, noise = random.Random(seed), NumpyRandom(seed)
    while True:
        pool = sorted((draw_sample(rng, noise, bank, mix) for _ in range(POOL)), key=lambda s: len(s.pcm))
        cut: list[list[Sample]] = [[]]
        for sample in pool:
            if cut[-1] and (len(cut[-1]) + 1) * len(sample.pcm) > batch_seconds * SAMPLE_RATE:
                cut.append([])
            cut[-1].append(sample)
        rng.shuffle(cut)
        yield from cut
