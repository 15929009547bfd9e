"""Reference implementation: unmodified processor and `generate`, one request at a time, for tests and verifying."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from af3pipe.models.decoding import Chooser
from af3pipe.models.family import Checkpoint, open_checkpoint
from af3pipe.models.inputs import Inputs, conversation, eos_token_ids, generation_config, heard_in, hf
from af3pipe.models.weights import load_model
from af3pipe.schemas import Reply, Request, Task, Turn


class Oracle:
    """Runs a checkpoint exactly as Hugging Face documents it: nothing is batched, shared or cut.

    Attributes:
        checkpoint: The checkpoint.
        model: The family's model class, in float32 on the CPU unless loaded otherwise.
        processor: The checkpoint's processor.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, processor: Any) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.processor = processor
        self._inputs = Inputs(checkpoint, processor)
        self._ends = eos_token_ids(model.generation_config)
        self._chooser = Chooser(processor.tokenizer, self._ends, model.config.get_text_config().vocab_size)

    @classmethod
    def load(cls, model: str, revision: str | None = None, *, device: str = "cpu") -> "Oracle":
        """Loads a checkpoint in float32.

        Raises:
            ModelError: There is no such checkpoint, or it cannot be loaded here.
        """
        checkpoint = open_checkpoint(model, revision)
        loaded = load_model(checkpoint, torch.device(device), torch.float32)
        return cls(checkpoint, loaded, Inputs.load(checkpoint).processor)

    def inputs(
        self, audios: Sequence[npt.NDArray[np.float32]], turns: Sequence[Turn], replies: Sequence[str] = ()
    ) -> Any:
        """Returns the inputs of `generate`: input_ids, attention_mask, features and their mask.

        For one audio they are the processor's output. It does not support several, as in AF3-Chat: those are built in
        the same way.
        """
        heard = heard_in(turns, len(audios))
        said = [(turn.prompt, [audios[place] for place in places]) for turn, places in zip(turns, heard, strict=True)]
        if sum(map(len, heard)) <= 1:
            return self.processor.apply_chat_template(
                [conversation(said, replies)], tokenize=True, add_generation_prompt=True, return_dict=True
            )
        tokens = [self.checkpoint.audio_tokens(len(audio)) for audio in audios]
        ids = torch.from_numpy(self._inputs.ids(self._inputs.prompt(turns, replies, tokens)))[None]
        size = self.checkpoint.limits.window_samples
        windows = [
            audio[start : start + size]
            for _, places in said
            for audio in places
            for start in range(0, len(audio), size)
        ]
        extracted = self.processor.feature_extractor(
            windows,
            sampling_rate=self.checkpoint.limits.sample_rate,
            return_attention_mask=True,
            return_tensors="pt",
        )
        features = {"input_features": extracted["input_features"], "input_features_mask": extracted["attention_mask"]}
        return hf.BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids), **features})

    def ask(self, samples: npt.NDArray[np.float32], task: Task, seed: int = 0) -> Reply:
        """Returns the reply to one task about one segment; its prompt must be filled in; the seed is the request's.

        Raises:
            ValueError: The task has no prompt, or earlier turns.
            ModelError: Its decoding parameters are invalid.
        """
        (reply,) = self.ask_all(Request(samples, (task,), seed))
        return reply

    def ask_all(self, request: Request) -> Iterator[Reply]:
        """Returns the replies to a request's tasks, one after the other.

        Raises:
            ValueError: A task has no prompt, or follows a turn that is not an earlier task.
            ModelError: Decoding parameters are invalid.
        """
        replies: dict[tuple[Turn, ...], Reply] = {}
        for task in request.tasks:
            if task.prompt is None:
                raise ValueError(f"task {task.name!r} has no prompt; resolve() it first")
            before = [task.turns[:count] for count in range(1, len(task.turns))]
            if missing := [turns for turns in before if turns not in replies]:
                raise ValueError(
                    f"task {task.name!r} follows {missing[0][-1].prompt!r}, which is not an earlier task"
                )
            said = [self._inputs.said(replies[turns]) for turns in before]
            reply = self._generate(self.inputs(request.audios, task.turns, said), task, request.seed)
            replies.setdefault(task.turns, reply)
            yield reply

    @torch.inference_mode()
    def _generate(self, inputs: Any, task: Task, seed: int) -> Reply:
        inputs = inputs.to(self.model.device)
        if "input_features" in inputs:
            inputs["input_features"] = inputs["input_features"].to(self.model.dtype)
        config = generation_config(task.decoding, self.model.generation_config)
        arguments = self._chooser.generate_arguments(task.decoding, seed)
        output = self.model.generate(**inputs, generation_config=config, **arguments)
        ids = inputs["input_ids"][0].cpu().numpy()
        tokens = output[0, len(ids) :].tolist()
        text = self.processor.tokenizer.decode(tokens)
        ended = tokens[-1] in self._ends or any(stop in text for stop in task.decoding.stop)
        prompt = np.where(ids == self.processor.audio_token_id, -1, ids)
        return self._inputs.reply(tokens, prompt, task, "stop" if ended else "length")


def ask_alone(model: str, samples: npt.NDArray[np.float32], task: Task) -> Reply:
    """Loads a checkpoint, runs one task, and frees it. For several tasks keep an `Oracle`."""
    return Oracle.load(model).ask(samples, task)
