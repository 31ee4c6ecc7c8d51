"""Loading the base model and its tokenizer: a local directory or a hub id, 4-bit or 16-bit, GPU or CPU."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer

from cluster import paths
from trainables.contract import TrialFailure
from trainables.spec import BaseModelSpec

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def source(spec: BaseModelSpec) -> str:
    """What transformers loads from: an absolute directory where there is one, otherwise the hub id."""
    directory = paths.expand(spec.model_name_or_path)
    return str(directory) if directory.exists() else spec.model_name_or_path


def load_tokenizer(spec: BaseModelSpec) -> Any:
    """The base's tokenizer, with a pad token (its end token where it has none of its own).

    Raises:
        ValueError: the directory or hub id holds no tokenizer.
    """
    tokenizer = _loaded(AutoTokenizer, spec, "has no tokenizer that can be loaded")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def vocabulary(spec: BaseModelSpec) -> int:
    """How many tokens the base has embeddings for; loads no weights.

    Raises:
        ValueError: the directory or hub id holds no model.
    """
    return _loaded(AutoConfig, spec, "cannot be loaded").get_text_config(decoder=True).vocab_size


def load_model(spec: BaseModelSpec, quantized: bool = True) -> PreTrainedModel:
    """The base in evaluation mode on this process's device.

    Args:
        quantized: False loads 16-bit (32-bit on a CPU) weights whatever the definition says: the base to merge into.

    Raises:
        ValueError: the directory or hub id holds no model of this kind.
    """
    from transformers import AutoModelForCausalLM  # twice what all else here takes; a driver loads no model

    dtype = compute_dtype(spec)
    model = _loaded(
        AutoModelForCausalLM,
        spec,
        "cannot be loaded",
        dtype=dtype,
        attn_implementation=_attention(spec),
        quantization_config=_nf4(spec, dtype) if quantized and spec.quantization == "nf4" else None,
        device_map={"": device()},
        use_safetensors=True,
    )
    model.config.use_cache = True
    return model.eval()


def load_merged(spec: BaseModelSpec, directory: str) -> PreTrainedModel:
    """A merged model on disk, in the definition's compute type."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=compute_dtype(spec), device_map={"": device()}, use_safetensors=True
    )
    return model.eval()


def with_adapter(model: PreTrainedModel, directory: str | Path) -> Any:
    """``model`` under an adapter in PEFT's format, as stock PEFT loads it."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(directory))


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(spec: BaseModelSpec) -> torch.dtype:
    """The definition's dtype; auto is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is emulated."""
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory was too small; on a CPU, and in cuBLAS, torch has no class of error for it."""
    words = ("DefaultCPUAllocator: can't allocate", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@contextmanager
def oom_is_a_result(doing: str = "") -> Iterator[None]:
    """
    Raises:
        TrialFailure: the block ran out of memory, ``doing`` what.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise TrialFailure("oom", doing + str(error).split("\n")[0]) from None


def fingerprint(spec: BaseModelSpec) -> str:
    """SHA-256 of a local base's weights, config and tokenizer; a hub id's revision stands for itself."""
    directory = Path(source(spec))
    if not directory.is_dir():
        return f"{spec.model_name_or_path}@{spec.revision}"
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*")):
        if file.suffix in {".safetensors", ".json", ".jinja", ".model"}:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _loaded(kind: Any, spec: BaseModelSpec, otherwise: str, **options: Any) -> Any:
    """What ``kind.from_pretrained`` makes of the base.

    Raises:
        ValueError: it cannot; with the words ``otherwise``.
    """
    try:
        return kind.from_pretrained(
            source(spec), revision=spec.revision, trust_remote_code=spec.trust_remote_code, **options
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"base_model: {spec.model_name_or_path!r} {otherwise}: {_first_line(error)}") from None


def _nf4(spec: BaseModelSpec, dtype: torch.dtype) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=spec.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _attention(spec: BaseModelSpec) -> str | None:
    """None leaves the choice to transformers: SDPA, or for a model that has no such attention its own."""
    if spec.attn_implementation != "auto":
        return spec.attn_implementation
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
