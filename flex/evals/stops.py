"""Where a completion ends: before the first stop sequence in its text, wherever its tokens divide it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# The first tokens of a text may decode otherwise than in its middle: a Llama tokenizer drops the
# space in front. So a completion is decoded behind the last tokens of its prompt.
_BEHIND = 4
# Tokens at the front of a window that may decode to less than a byte of the text
_SLACK = 8


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the earliest place where one of `stops` begins.

    >>> cut("a\\n#\\ndef", ["\\ndef", "\\n#"])
    'a'
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


class Completion:
    """The text of one completion while its tokens come in.

    Args:
        tokenizer: of the model.
        prompt: token ids of the prompt; stops are looked for after it only.
        stops: sequences of characters; an empty one is refused.

    Attributes:
        ids: tokens so far.

    Raises ValueError for an empty stop, which would end every completion at once.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stops: Sequence[str]
    ) -> None:
        if "" in stops:
            raise ValueError("an empty stop sequence ends every completion before it begins")
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._behind = list(prompt[-_BEHIND:])
        self._stops = tuple(stops)
        # Every token is at least one byte, so a stop that ends in the newest token begins in these
        self._window = _SLACK + max((len(stop.encode()) for stop in stops), default=0)

    def push(self, token: int) -> bool:
        """Add a token; whether a stop is in the text now."""
        self.ids.append(token)
        if not self._stops:
            return False
        window = [*self._behind, *self.ids][-self._window :]
        recent = self._decode(window)
        if not any(stop in recent for stop in self._stops):
            return False
        text = self._whole()  # the window may begin in the prompt
        return any(stop in text for stop in self._stops)

    def text(self) -> str:
        """The completion, without what comes from the first stop on."""
        return cut(self._whole(), self._stops)

    def _whole(self) -> str:
        before, both = self._decode(self._behind), self._decode([*self._behind, *self.ids])
        return both[len(before) :] if both.startswith(before) else self._decode(self.ids)

    def _decode(self, ids: list[int]) -> str:
        # Cleaning up would take the space out of " ," in code
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
