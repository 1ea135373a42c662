"""VQA v2 (section 5.3): the official accuracy, and answers by ranking a list or by generation.

The accuracy of an answer is the mean, over the ten annotators, of min(1, a third of the others who
gave it); answers are compared as the official scorer compares them (`normalise_answer`).
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfast.data import BlipTokenizer, pre_question
from blipfast.data.text import TextBatch
from blipfast.errors import DataError
from blipfast.models.blip import PackedText
from blipfast.models.reference import encode_padded
from blipfast.tasks.vqa import BlipForVQA

_PUNCTUATION = list(';/[]"{}()=+\\_-><@`,?!')
_PERIOD, _COMMA = re.compile(r"(?!<=\d)(\.)(?!\d)"), re.compile(r"(\d)(,)(\d)")
_NUMBERS = "zero one two three four five six seven eight nine ten".split()  # noqa: SIM905
_DIGITS = {"none": "0", **{word: str(n) for n, word in enumerate(_NUMBERS)}}
_ARTICLES = frozenset({"a", "an", "the"})
# What is written without its apostrophe, or with one of two.
_SHORT = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
    how'd how'll how's I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've
    needn't not've o'clock oughtn't shan't should've shouldn't somebody'll somebody's
    someone'd someone'll someone's something'd something'll that's there'd there're there's
    they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'll who's who've why'll why're why's won't
    would've wouldn't y'all you'd you'll you're you've
""".split()  # noqa: SIM905
_LONG = """
    couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've
    somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've
    wouldn't've y'all'll y'all'd've you'd've
""".split()  # noqa: SIM905


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _SHORT}
    for word in _LONG:  # one of the two apostrophes is missing
        first, second, *rest = word.split("'")
        tail = "'".join([second, *rest])
        table[first + tail] = word
        table[first + "'" + tail.replace("'", "")] = word
    return table


_CONTRACTIONS = _contractions()


def normalise_answer(answer: str) -> str:
    """As the official scorer compares answers: punctuation, numbers, articles, contractions."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for mark in _PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text or _COMMA.search(text) is not None
        out = out.replace(mark, "" if apart else " ")
    out = _PERIOD.sub("", out)
    words = [_DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """The official accuracy of one answer, 0 to 1. Raises DataError without annotators."""
    if not annotators:
        raise DataError("a question without answers cannot be scored; use --output for the server")
    given = [one.replace("\n", " ").replace("\t", " ").strip() for one in annotators]
    mine = answer.replace("\n", " ").replace("\t", " ").strip()
    if len(set(given)) > 1:  # where all agree, answers are compared as they are
        given, mine = [normalise_answer(one) for one in given], normalise_answer(mine)
    same = [one == mine for one in given]
    shares = [min(1.0, (sum(same) - own) / 3) for own in same]
    return sum(shares) / len(shares)


def accuracy_by_type(scores: Sequence[float], types: Sequence[str]) -> dict[str, float]:
    """Mean accuracy in percent over all questions, and over those of each answer type."""
    by_type: dict[str, list[float]] = {}
    for score, kind in zip(scores, types, strict=True):
        by_type.setdefault(kind, []).append(score)
    means = {kind: 100 * sum(values) / len(values) for kind, values in sorted(by_type.items())}
    return {"overall": 100 * sum(scores) / max(1, len(scores)), **means}


@torch.no_grad()
def rank_plainly(
    model: BlipForVQA, question: Tensor, mask: Tensor, ids: Tensor, answer_mask: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Candidates `(B, k)` and the log-likelihood of each, as the original ranks them.

    Question states and their keys and values are repeated for each candidate, answers padded, and
    logits are over the whole vocabulary: what `BlipForVQA.rank` is measured against.
    question: `(B, L, D)`, encoded; mask: `(B, L)`. ids, answer_mask: `(A, M)`, all answers.
    """
    batch, dec = len(question), model.text_config.dec_token_id
    starts = torch.full((batch, 1), dec, device=ids.device)
    hidden = encode_padded(
        model.decoder, starts, torch.ones_like(starts), cross_embeds=question, cross_mask=mask,
        causal=True,
    )  # fmt: skip
    probs = model.lm_head(hidden)[:, 0].float().softmax(-1)[:, ids[:, 1]]
    chosen = probs.topk(k, dim=1).indices
    inputs, keep = ids[chosen.flatten()].clone(), answer_mask[chosen.flatten()]
    inputs[:, 0] = dec
    hidden = encode_padded(
        model.decoder, inputs, keep, cross_embeds=question.repeat_interleave(k, dim=0),
        cross_mask=mask.repeat_interleave(k, dim=0), causal=True,
    )  # fmt: skip
    logits = model.lm_head(hidden)[:, :-1].contiguous().float()
    targets = inputs.masked_fill(keep == 0, -100)[:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=model.label_smoothing,
        reduction="none",
    )  # fmt: skip
    return chosen, -losses.view(batch, k, -1).sum(-1)


class Answerer:
    """Answers questions about images, or about whatever `image_embeds` show.

    candidates: rank these, the k likeliest by their first token; None generates.
    attend_padding: of generation, see `BlipForVQA.generate`.
    """

    def __init__(
        self,
        model: BlipForVQA,
        tokenizer: BlipTokenizer,
        *,
        candidates: Sequence[str] | None = None,
        k: int = 128,
        attend_padding: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.candidates, self.k = model, tokenizer, candidates, k
        self.attend_padding = attend_padding
        self._device = next(model.parameters()).device
        self._listed: PackedText | None = None
        if candidates is not None:
            tokens = tokenizer(candidates, 64, kind="raw").to(self._device)
            self._listed = PackedText.from_padded(tokens.input_ids, tokens.attention_mask)

    def pairs(self, questions: int) -> int:
        """How many questions with an answer are looked at for so many questions."""
        return questions * (1 if self.candidates is None else min(self.k, len(self.candidates)))

    def _encoded(self, questions: Sequence[str]) -> TextBatch:
        cleaned = [pre_question(question) for question in questions]
        return self.tokenizer(cleaned, max_length=35, kind="raw").to(self._device)

    @torch.inference_mode()
    def __call__(self, image_embeds: Tensor, questions: Sequence[str]) -> list[str]:
        """An answer to each of B questions, `image_embeds (B, S, D)`."""
        asked = self._encoded(questions)
        if self._listed is None or self.candidates is None:
            generated = self.model.generate(
                None, asked.input_ids, asked.attention_mask, image_embeds=image_embeds,
                attend_padding=self.attend_padding,
            )  # fmt: skip
            rows = generated.new_tokens(sep_token_id=self.tokenizer.sep_token_id)
            return [self.tokenizer.decode(row) for row in rows]
        text = PackedText.from_padded(asked.input_ids, asked.attention_mask)
        states = self.model.question_states(image_embeds, text)
        best = self.model.best(states, self._listed, k=self.k)
        return [self.candidates[i] for i in best.answer_ids.tolist()]

    @torch.inference_mode()
    def beside_reference(
        self, image_embeds: Tensor, questions: Sequence[str]
    ) -> dict[str, float] | None:
        """Finds some questions' best candidates by `rank_plainly` too: both speeds, text side.

        None where nothing is ranked.
        """
        if self._listed is None or self.candidates is None:
            return None
        k = min(self.k, len(self.candidates))
        asked = self._encoded(questions)
        text = PackedText.from_padded(asked.input_ids, asked.attention_mask)
        answers = self.tokenizer(self.candidates, 64, kind="raw").to(self._device)
        states = self.model.question_states(image_embeds, text)
        self.model.best(states, self._listed, k=k)  # warm
        start = time.perf_counter()
        best = self.model.best(states, self._listed, k=k)
        between = time.perf_counter()
        _, likelihood = rank_plainly(
            self.model, states.embeds[0], asked.attention_mask, answers.input_ids,
            answers.attention_mask, k,
        )  # fmt: skip
        end = time.perf_counter()
        apart = (best.log_likelihood - likelihood.amax(1)).abs().max()
        pairs = k * len(questions)
        return {
            "pairs": pairs,
            "scored": best.scored,
            "decided_per_second": round(pairs / (between - start), 1),
            "pairs_per_second": round(pairs / (end - between), 1),
            "times_as_fast": round((end - between) / (between - start), 2),
            "largest_difference_of_log_likelihoods": float(apart),
        }
