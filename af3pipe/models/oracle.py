"""The reference: stock processor and stock `generate`, one request at a time. For tests and for checking a run."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from af3pipe.models.family import Checkpoint, open_checkpoint
from af3pipe.models.inputs import Inputs, conversation, generation_config, load_model
from af3pipe.schemas import Reply, Task


class Oracle:
    """A checkpoint asked exactly as Hugging Face documents it: nothing batched, nothing shared, nothing cut.

    Attributes:
        checkpoint: What is asked.
        model: The family's class, in float32 on the CPU unless loaded otherwise.
        processor: The checkpoint's own.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, processor: Any) -> None:
        self.checkpoint = checkpoint
        self.model = model
        self.processor = processor

    @classmethod
    def load(cls, model: str, revision: str | None = None, *, device: str = "cpu") -> "Oracle":
        """Loads a checkpoint in float32.

        Raises:
            ModelError: There is no such checkpoint, or it cannot be loaded here.
        """
        checkpoint = open_checkpoint(model, revision)
        loaded = load_model(checkpoint, torch.device(device), torch.float32)
        return cls(checkpoint, loaded, Inputs.load(checkpoint).processor)

    def inputs(self, samples: npt.NDArray[np.float32], prompt: str) -> Any:
        """What the stock processor makes of one turn: input_ids, attention_mask, features and their mask."""
        return self.processor.apply_chat_template(
            [conversation(prompt, samples)], tokenize=True, add_generation_prompt=True, return_dict=True
        )

    @torch.inference_mode()
    def ask(self, samples: npt.NDArray[np.float32], task: Task) -> Reply:
        """The reply to one task about one segment; its prompt must be filled in.

        Raises:
            ValueError: The task has no prompt.
        """
        if task.prompt is None:
            raise ValueError(f"task {task.name!r} has no prompt; resolve() it first")
        inputs = self.inputs(samples, task.prompt).to(self.model.device, self.model.dtype)
        config = generation_config(task.decoding, self.model.generation_config)
        output = self.model.generate(**inputs, generation_config=config)
        ids = inputs["input_ids"][0].cpu()
        return Inputs(self.checkpoint, self.processor).reply(
            output[0, len(ids) :].tolist(), ids, task, self.model.generation_config
        )


def ask_alone(model: str, samples: npt.NDArray[np.float32], task: Task) -> Reply:
    """Loads a checkpoint, asks one thing, and lets it go. For several questions keep an `Oracle`."""
    return Oracle.load(model).ask(samples, task)
