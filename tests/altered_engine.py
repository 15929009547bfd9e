"""Provides an engine with one wrong reply, which verifying must detect. Registered in `ENGINES` by the test."""

from concurrent.futures import Future

from af3pipe.models.transformers_engine import TransformersEngine

ALTERED_S = 3.0  # of the one recording whose last reply is wrong


class AlteredEngine(TransformersEngine):
    """Changes a token of the last reply to a request of exactly `ALTERED_S`; stock `generate` is left as it is."""

    def submit(self, request):
        future = super().submit(request)
        if len(request.audios[0]) != ALTERED_S * 16_000:
            return future
        altered = Future()
        future.add_done_callback(lambda done: altered.set_result(_altered(done.result())))
        return altered


def _altered(replies):
    *others, last = replies
    tokens = (*last.tokens[:1], last.tokens[1] + 1, *last.tokens[2:])
    return [*others, last._replace(tokens=tokens, text=f"{last.text[:4]}WRONG")]
