"""What an adapter's answers to the eval split are worth, for a search that goes by more than eval loss."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

from trainables import base, metrics, scoring
from trainables.answers import kind_of
from trainables.contract import Measurement
from trainables.data import snapshot
from trainables.generation import Model, with_transformers


class Examiner:
    """Asks one adapter after the other, on a base that it loads for the first and keeps.

    The prompts are of the eval split: the test split stays unseen until the gate. They come from files that the test
    split has examples of, for others are mixed in for other reasons than to be answered well.
    """

    def __init__(self, wanted: Measurement, dataset: str) -> None:
        self.wanted, self.dataset = wanted, dataset
        self.turn = threading.Lock()
        self.base: Any = None

    def measure(self, adapter: Path) -> dict[str, float]:
        """Every metric of the adapter's answers, and their mean length in tokens.

        Raises:
            TrialFailure: out of memory.
        """
        with self.turn:
            contestant = Model(self.wanted.base_model)
            self.base, tokenizer = self.base or contestant.load(), contestant.tokenizer()
            model: Any = base.with_adapter(self.base, adapter).eval()
            try:
                with base.oom_is_a_result("while answering: "):
                    generate = with_transformers(model, tokenizer, self.wanted.evaluation)
                    answers = scoring.answer(generate, tokenizer, self._rows())
            finally:
                self.base = model.unload()
        kind = kind_of([one.expected for one in answers])
        return metrics.measure(kind, answers, self.wanted.evaluation.json_fields) | {
            "answer_tokens": metrics.sizes(answers)["answer_tokens"]
        }

    def _rows(self) -> list[dict[str, Any]]:
        rows = scoring.of_test_files(snapshot.load(Path(self.dataset)), "eval")
        return random.Random(self.wanted.evaluation.seed).sample(rows, min(self.wanted.prompts, len(rows)))
