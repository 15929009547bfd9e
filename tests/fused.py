"""Shows a pipeline as its runner sees it: fused into stages, with data shuffled, stored or sent between them.

The fusion is Beam's own, for its portable runners; Dataflow and Flink fuse by the same rules, and no stage spans two
environments or a shuffle on any of them.
"""

import typing
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
from apache_beam.pipeline import PipelineVisitor
from apache_beam.portability import common_urns
from apache_beam.runners.portability.fn_api_runner import translations
from apache_beam.runners.worker.bundle_processor import DATA_INPUT_URN, DATA_OUTPUT_URN
from apache_beam.transforms import resources
from apache_beam.typehints.typehints import TypeConstraint

from af3pipe.transforms.decode import Decoder

# What a runner does itself; all else is done in a worker.
_RUNNERS_OWN = frozenset(
    {
        common_urns.primitives.FLATTEN.urn,
        common_urns.primitives.GROUP_BY_KEY.urn,
        common_urns.primitives.IMPULSE.urn,
        common_urns.composites.RESHUFFLE.urn,
    }
)
_PHASES = [
    translations.annotate_downstream_side_inputs,
    translations.annotate_stateful_dofns_as_roots,
    translations.fix_side_input_pcoll_coders,
    translations.pack_combiners,
    translations.lift_combiners,
    translations.expand_sdf,
    translations.greedily_fuse,
    translations.sort_stages,
]


class Stage(NamedTuple):
    """What runs in one worker without leaving it.

    Attributes:
        steps: Names of transforms.
        accelerator: Beam's resource hint; empty where there is none.
    """

    steps: tuple[str, ...]
    accelerator: str


class Moved(NamedTuple):
    """A collection that leaves a stage.

    Attributes:
        made_by: Name of the transform.
        taken_by: Names of transforms of other stages.
        element_type: Of the collection; None for one that Beam made while it fused.
        may_hold_audio: Whether the type says so; or does not say, and it is decoded, or made of what may hold audio.
    """

    made_by: str
    taken_by: tuple[str, ...]
    element_type: Any
    may_hold_audio: bool


class Fused(NamedTuple):
    """A pipeline's stages, and what moves between them."""

    stages: tuple[Stage, ...]
    moved: tuple[Moved, ...]

    def stage_of(self, step):
        """The one with a step of this name, or with steps below it."""
        (found,) = {
            stage for stage in self.stages if any(name == step or name.startswith(f"{step}/") for name in stage.steps)
        }
        return found

    @property
    def audio_moved(self):
        """What moves though it may hold audio, in sentences: empty for a pipeline that is right."""
        return [
            f"{found.made_by} gives {found.element_type} to {', '.join(found.taken_by)}, in another stage"
            for found in self.moved
            if found.may_hold_audio
        ]


def fuse(pipeline, proto=None, context=None):
    """Fuses a pipeline that is laid, bounded or not, whatever its runner; nothing of it runs.

    Args:
        pipeline: Which.
        proto: What a runner has made of it, where it has.
        context: Of the `proto`.
    """
    if proto is None:
        proto, context = pipeline.to_runner_api(return_context=True)
    types = {key: context.pcollections.get_by_id(key).element_type for key in proto.components.pcollections}
    decoding = _Decoding()
    pipeline.visit(decoding)
    _, stages = translations.create_and_optimize_stages(proto, _PHASES, _RUNNERS_OWN)
    steps = [transform for stage in stages for transform in stage.transforms if not _is_port(transform)]
    makers = {output: step.unique_name for step in steps for output in step.outputs.values()}
    takers = defaultdict(list)
    for step in steps:
        for taken in step.inputs.values():
            takers[taken].append(step.unique_name)
    audio = _may_hold_audio(steps, types, decoding.names)
    leaving = sorted(
        {
            taken
            for stage in stages
            for transform in stage.transforms
            if transform.spec.urn == DATA_OUTPUT_URN
            for taken in transform.inputs.values()
        }
    )
    return Fused(
        tuple(_stage(stage, proto.components.environments) for stage in stages),
        tuple(Moved(makers[key], tuple(takers[key]), types.get(key), key in audio) for key in leaving),
    )


class _Decoding(PipelineVisitor):
    """Names of the steps that have a decoder."""

    def __init__(self):
        self.names = set()

    def visit_transform(self, node):
        fn = getattr(node.transform, "fn", None)
        if any(isinstance(part, Decoder) for part in vars(fn or self).values()):
            self.names.add(node.full_label)


def _is_port(transform):
    return transform.spec.urn in (DATA_INPUT_URN, DATA_OUTPUT_URN)


def _stage(stage, environments):
    hints = environments[stage.environment].resource_hints if stage.environment else {}
    return Stage(
        tuple(step.unique_name for step in stage.transforms if not _is_port(step)),
        bytes(hints.get(resources.AcceleratorHint.urn, b"")).decode(),
    )


def _may_hold_audio(steps, types, decoding):
    """Ids of collections, found by going on until nothing is added: the steps come in no order.

    What a step that decodes gives may be audio, and so may what is made of that, unless its type says what it is.
    """
    made = {output for step in steps if step.unique_name in decoding for output in step.outputs.values()}
    found = {key for key, hint in types.items() if holds_audio(hint)}
    found |= {key for key in made if holds_audio(types.get(key, Any)) is None}
    while True:
        made = {
            output
            for step in steps
            if found & set(step.inputs.values())
            for output in step.outputs.values()
            if holds_audio(types.get(output, Any)) is not False
        }
        if made <= found:
            return found
        found |= made


def holds_audio(hint):
    """Whether values of this type hold samples; None where the type does not say what is in them."""
    if hint is np.ndarray or typing.get_origin(hint) is np.ndarray:
        return True
    if hint in (Any, object) or isinstance(hint, typing.TypeVar) or str(hint) == "Any":
        return None
    if isinstance(hint, TypeConstraint):
        parts = list(hint._inner_types()) or [Any]
    elif hasattr(hint, "_fields"):
        parts = list(typing.get_type_hints(hint).values())
    elif typing.get_origin(hint):
        parts = [part for part in typing.get_args(hint) if part is not ...]
    else:
        return False
    said = [holds_audio(part) for part in parts]
    return True if True in said else None if None in said else False
