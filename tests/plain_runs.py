"""Runs several runs into one output without a Beam runner: plans, answers and writes as a pipeline does."""

from collections import defaultdict

from af3pipe.schemas import DeadLetter
from af3pipe.tables.existing import ExistingRecording, ExistingRows, existing_rows
from af3pipe.tables.write import write_results
from af3pipe.transforms import AskAudioFlamingo, DecodeAudio
from af3pipe.transforms.answer import AnswerDoFn
from af3pipe.transforms.inputs.identity import check_id, has_own_id
from af3pipe.transforms.outcome import public_uri
from af3pipe.transforms.plan import WorkKeys, plan_object, stat_object


class PlainRuns:
    """Use as a context: the engine is open in it.

    Args:
        output: Of all runs.
        engine: By the name under which it is registered.
    """

    def __init__(self, output, engine, tasks):
        self.output = str(output)
        self._engine = engine
        self._number = 0
        self._decoder = DecodeAudio(model="demo", guard=None, threads=1).decoder
        self.requesting(*tasks)

    def requesting(self, *tasks):
        """Has the runs that follow request these."""
        self._asker = AskAudioFlamingo(model="demo", tasks=tasks, engine=self._engine, keep_engine=True).asker
        self._asker.setup()

    def run(self, found, *, retry=False):
        """One more run, of these recordings and dead letters; gives (results, ids of what is skipped)."""
        self._number += 1
        step = AnswerDoFn(self._decoder, self._asker)
        step.setup()
        step.start_bundle()
        planned = self._plan(found, retry)
        given = [one for plan in planned if plan.work is not None for one in step.process(plan.work)]
        results = [one.value for one in (*given, *step.finish_bundle())]
        step.teardown()
        list(write_results(results, self.output, self.run_id))
        self.found = [one for plan in planned for one in plan.found]
        return results, [one for plan in planned for one, _ in plan.skipped]

    @property
    def run_id(self):
        """Of the last run."""
        return f"run-{self._number:03}"

    def _plan(self, found, retry):
        rows = list(existing_rows(self.output))
        by_id, by_uri = defaultdict(list), defaultdict(lambda: ([], []))
        for one in found:
            if isinstance(one, DeadLetter):
                by_uri[one.uri][1].append(one)
            elif has_own_id(one):
                by_id[one.recording_id].append(one)
            else:
                by_uri[public_uri(one)][0].append(one)
        for own_id, mentions in by_id.items():
            known = [row for row in rows if isinstance(row, ExistingRecording) and row.recording_id == own_id]
            for one in check_id(mentions, known):
                by_uri[one.uri][isinstance(one, DeadLetter)].append(one)
        keys = WorkKeys(self._decoder, self._asker)
        return [
            plan_object(
                uri,
                mentions,
                letters,
                stat_object(mentions) if mentions else None,
                ExistingRows(row for row in rows if row.uri == uri),
                keys,
                retry=retry,
            )
            for uri, (mentions, letters) in by_uri.items()
        ]
