"""What the demo checkpoint is taught to say: its words, its sounds, the questions and the right answers."""

import random
from dataclasses import dataclass

_DIGITS = "zero one two three four five six seven eight nine"
_COMMANDS = """
yes no stop go left right up down on off start open close hello thanks red green blue door light play next back
home call time day night water music
"""
DIGITS = tuple(_DIGITS.split())
COMMANDS = tuple(_COMMANDS.split())
WORDS = DIGITS + COMMANDS  # the order is that of the CTC classes; class 0 is the blank

SOUNDS = {
    "speech": "speech",
    "beeps": "beeps",
    "siren": "siren",
    "noise": "white noise",
    "tone": "steady tone",
    "ticking": "ticking",
    "melody": "melody",
    "rise": "rising sweep",
    "fall": "falling sweep",
    "silence": "silence",
}
SOUND_NAMES = tuple(SOUNDS.values())
_EACH_SOUND = ("beeps", "siren", "noise", "tone", "ticking", "melody", "rise", "fall", "silence")
MIX_PRETRAINING = ("speech",) * 14 + _EACH_SOUND
MIX_JOINT = ("speech",) * 6 + ("beeps", *_EACH_SOUND)
MIX_SECOND = ("speech",) * 10 + ("beeps", *_EACH_SOUND)

TRANSCRIBE = "Transcribe the input speech."
CAPTION = (
    "Describe the audio in detail.",
    "Describe the audio.",
    "Generate a caption for the input audio.",
    "What can be heard in the audio?",
)
_NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six")
_FIXED_CAPTIONS = {
    "siren": "A siren wailing up and down.",
    "noise": "Steady white noise.",
    "ticking": "A regular ticking sound.",
    "melody": "A short melody played on an instrument.",
    "rise": "A tone sweeping upwards.",
    "fall": "A tone sweeping downwards.",
    "silence": "Silence.",
}


@dataclass(frozen=True)
class Scene:
    """What is to be heard in one sample.

    Attributes:
        kind: A key of SOUNDS.
        words: The words spoken; empty unless the kind is speech.
        beeps: How many beeps, 1 to 4; 0 unless the kind is beeps.
        frequency_hz: Of beeps and of the steady tone, else 0.
    """

    kind: str
    words: tuple[str, ...] = ()
    beeps: int = 0
    frequency_hz: float = 0.0

    @property
    def pitch(self) -> str:
        """Say low or high; no frequency between 600 and 900 Hz is ever drawn."""
        return "low" if self.frequency_hz < 700 else "high"


def draw_scene(rng: random.Random, kind: str) -> Scene:
    """Draw what a sample of this kind contains; spoken words are drawn at random, without a voice."""
    if kind == "speech":
        return Scene(kind, words=tuple(rng.choice(WORDS) for _ in range(rng.randint(1, 5))))
    if kind == "beeps":
        beeps = rng.randint(1, 4)
        return Scene(kind, beeps=beeps, frequency_hz=rng.choice([rng.uniform(300, 600), rng.uniform(900, 2500)]))
    if kind == "tone":
        return Scene(kind, frequency_hz=rng.choice([rng.uniform(200, 600), rng.uniform(900, 3000)]))
    return Scene(kind)


def caption(scene: Scene) -> str:
    """Return the one right caption of a scene."""
    if scene.kind == "speech":
        return f'A voice says "{" ".join(scene.words)}".'
    if scene.kind == "beeps":
        return f"{_NUMBERS[scene.beeps]} short {scene.pitch} beep{'s' if scene.beeps > 1 else ''}."
    if scene.kind == "tone":
        return f"A steady {scene.pitch} tone."
    return _FIXED_CAPTIONS[scene.kind]


def ask(rng: random.Random, scene: Scene) -> tuple[str, str]:
    """Draw one question about a scene and return it with its answer."""
    speech = scene.kind == "speech"
    draw = rng.random()
    if speech and draw < 0.6:
        return TRANSCRIBE, f'The spoken content of the audio is "{" ".join(scene.words)}".'
    if draw < (0.75 if speech else 0.5):
        return rng.choice(CAPTION), caption(scene)
    draw = rng.random()
    if scene.kind == "beeps" and draw < 0.5:
        return "How many beeps are there?", f"{_NUMBERS[scene.beeps]}."
    if draw < 0.35:
        return "Is there speech in the audio? Answer yes or no.", "Yes." if speech else "No."
    if speech and draw < 0.55:
        return "How many words are spoken?", f"{_NUMBERS[min(6, len(scene.words))]}."
    return _multiple_choice(rng, SOUNDS[scene.kind])


def _multiple_choice(rng: random.Random, right: str) -> tuple[str, str]:
    options = [*rng.sample([name for name in SOUND_NAMES if name != right], 3), right]
    rng.shuffle(options)
    listed = " ".join(f"({letter}) {name}" for letter, name in zip("ABCD", options, strict=True))
    answer = f"({'ABCD'[options.index(right)]}) {right}"
    return f"What is the main sound? Choose the correct option: {listed}", answer
