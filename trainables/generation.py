"""Greedy answers in batches: by vLLM where asked for, otherwise by transformers. No other module has vLLM in it."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainables import base
from trainables.spec import BaseModelSpec, EvaluationSpec


@dataclass(frozen=True)
class Generated:
    """What came after one prompt."""

    text: str
    tokens: int
    """The end token among them."""
    seconds: float
    """Of the batch, divided by the prompts in it."""


@dataclass(frozen=True)
class Generate:
    """Takes prompts in tokens and answers each, in their order."""

    engine: Literal["vllm", "transformers"]
    answers: Callable[[Sequence[list[int]]], list[Generated]]

    def __call__(self, prompts: Sequence[list[int]]) -> list[Generated]:
        return self.answers(prompts)


_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM makes room for."""


@dataclass(frozen=True)
class Model:
    """What a contestant is: the definition's base, the same with an adapter, or merged weights on disk."""

    spec: BaseModelSpec
    adapter: str | None = None
    merged: str | None = None

    def load(self) -> Any:
        """By transformers, and peft, in evaluation mode."""
        if self.merged:
            return base.load_merged(self.spec, self.merged)
        model = base.load_model(self.spec)
        return base.with_adapter(model, self.adapter).eval() if self.adapter else model

    def tokenizer(self) -> Any:
        """A merged model's own, which is served beside it, otherwise the base's."""
        return base.load_tokenizer(BaseModelSpec(model_name_or_path=self.merged) if self.merged else self.spec)


def with_transformers(model: Any, tokenizer: Any, evaluation: EvaluationSpec) -> Generate:
    """By a loaded model, ``evaluation.batch_size`` prompts of like length at a time."""

    def generate(prompts: Sequence[list[int]]) -> list[Generated]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        made: dict[int, Generated] = {}
        for start in range(0, len(order), evaluation.batch_size):
            batch = order[start : start + evaluation.batch_size]
            began = time.perf_counter()
            found = _greedy(model, tokenizer, [prompts[index] for index in batch], evaluation.max_new_tokens)
            seconds = round((time.perf_counter() - began) / len(batch), 4)
            for index, tokens in zip(batch, found, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                made[index] = Generated(text, int((tokens != tokenizer.pad_token_id).sum()), seconds)
        return [made[index] for index in range(len(prompts))]

    return Generate("transformers", generate)


@torch.inference_mode()
def _greedy(model: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> torch.Tensor:
    """Tokens after each prompt, [prompts, longest answer]."""
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    made = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return made[:, inputs["input_ids"].shape[1] :]


def takes_vllm(model: Model, evaluation: EvaluationSpec, loaded: Any) -> bool:
    """Whether vLLM answers: where it is installed and answers as well, unless the definition says otherwise.

    On a CPU it does not for a 4-bit base, which bitsandbytes multiplies with in a way of its own there; on a GPU its
    16-bit weights have to leave room for everything else.

    Args:
        loaded: the contestant, by ``Model.load``.
    """
    if evaluation.generation != "auto":
        return evaluation.generation == "vllm"
    if importlib.util.find_spec("vllm") is None:
        return False
    if not torch.cuda.is_available():
        return model.spec.quantization == "none"
    return 2 * loaded.num_parameters() < 0.6 * torch.cuda.mem_get_info()[1]


def with_vllm(model: Model, evaluation: EvaluationSpec) -> Generate:
    """By an engine in this process, which batches by itself and loads the model again: none should be on the device.

    vLLM has no bitsandbytes. Of a 4-bit base it gets the weights that 4-bit layers multiply with, written out once.

    Raises:
        ValueError: vLLM does not take this model; the line has its own reason.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # contestants would all bind to the same cores
    scratch = tempfile.TemporaryDirectory(prefix="winnow-dequantised-")
    arguments = _engine_arguments(model, Path(scratch.name))
    _free()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    try:
        engine = LLM(**arguments, **_room())
    except (ValueError, NotImplementedError) as error:
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"evaluation.generation: vllm does not take this model: {line}; use transformers") from None
    finally:
        scratch.cleanup()
    sampling = SamplingParams(temperature=0, max_tokens=evaluation.max_new_tokens)
    adapter = LoRARequest("contestant", 1, model.adapter) if model.adapter else None

    def generate(prompts: Sequence[list[int]]) -> list[Generated]:
        began = time.perf_counter()
        asked: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = engine.generate(asked, sampling, use_tqdm=False, lora_request=adapter) if asked else []
        seconds = round((time.perf_counter() - began) / max(1, len(prompts)), 4)
        return [Generated(one.outputs[0].text, len(one.outputs[0].token_ids), seconds) for one in done]

    return Generate("vllm", generate)


def _engine_arguments(model: Model, scratch: Path) -> dict[str, Any]:
    """vLLM's words for a contestant. A 4-bit base is written to ``scratch`` in the compute type."""
    spec = model.spec
    arguments: dict[str, Any] = {
        "model": model.merged or base.source(spec),
        "dtype": str(base.compute_dtype(spec)).removeprefix("torch."),
        "disable_log_stats": True,
        "seed": 0,
    }
    if not model.merged:
        arguments |= {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    if not model.merged and spec.quantization == "nf4":
        base.load_model(spec).dequantize().save_pretrained(scratch)
        base.load_tokenizer(spec).save_pretrained(scratch)
        arguments |= {"model": str(scratch), "revision": None}
    if model.adapter:
        rank = json.loads((Path(model.adapter) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        arguments |= {"enable_lora": True, "max_lora_rank": next(able for able in _RANKS if able >= rank)}
    return arguments


def _room() -> dict[str, Any]:
    """What of this device vLLM may take."""
    if not torch.cuda.is_available():
        return {"enforce_eager": True, "max_num_seqs": 16}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_memory_utilization": round(0.9 * free / total, 2)}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
