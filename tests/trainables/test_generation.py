"""vLLM and transformers answer alike: real vLLM, on this machine's CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainables import generation
from trainables.spec import BaseModelSpec, EvaluationSpec

ROOT = Path(__file__).parent.parent.parent

# vLLM sets up torch for its whole process: it gets one of its own, as in a Ray task
_BOTH = """
import json, sys
import torch
from peft import LoraConfig, get_peft_model
from trainables import base, generation
from trainables.spec import BaseModelSpec, EvaluationSpec
home = sys.argv[1]
evaluation, answers = EvaluationSpec(max_new_tokens=12), []
torch.manual_seed(0)
plain = BaseModelSpec(model_name_or_path=home + "/bases/tiny", quantization="none")
wide = get_peft_model(base.load_model(plain), LoraConfig(r=12, lora_alpha=24, target_modules="all-linear"))
for name, weight in wide.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(weight, std=0.05)
wide.save_pretrained(home + "/adapter")
base.load_model(plain).save_pretrained(home + "/merged")
base.load_tokenizer(plain).save_pretrained(home + "/merged")
nf4 = BaseModelSpec(model_name_or_path=home + "/bases/tiny", quantization="nf4")
models = [generation.Model(plain), generation.Model(plain, adapter=home + "/adapter"),
          generation.Model(plain, merged=home + "/merged"), generation.Model(nf4)]
for model in models:
    tokenizer = model.tokenizer()
    prompts = [tokenizer(f"<|bos|><|user|>Repeat: {word}<|end|><|assistant|>")["input_ids"]
               for word in ("lemon", "apple tree", "six", "a long list of words", "blue")]
    both = [generation.with_transformers(model.load(), tokenizer, evaluation), generation.with_vllm(model, evaluation)]
    answers.append([[(one.text, one.tokens) for one in generate(prompts)] for generate in both])
print(json.dumps(answers))
"""


def test_vllm_answers_as_transformers_does(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BOTH, str(home)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain, adapted, merged, four_bit = json.loads(done.stdout.strip().splitlines()[-1])
    assert plain[0] == plain[1]
    assert adapted[0] == adapted[1] != plain[0], "an adapter of a rank that vLLM has no room of its own for"
    assert merged[0] == merged[1] == plain[0]
    # bitsandbytes' own product on a CPU rounds more than the weights that it stands for
    same = sum(ours == theirs for ours, theirs in zip(*four_bit, strict=True))
    assert same >= 3, four_bit
    assert four_bit[1] != plain[1], "the rounded weights, not the original's"


def test_a_model_that_vllm_does_not_know_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["NoSuchModel"]}))
    code = (
        "import sys; from trainables import generation; from trainables.spec import *;"
        "model = generation.Model(BaseModelSpec(model_name_or_path=sys.argv[1], quantization='none'));"
        "generation.with_vllm(model, EvaluationSpec())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: evaluation.generation: vllm does not take this model: ")
    assert last.endswith("; use transformers")


@pytest.mark.parametrize(
    ("wanted", "gpu", "quantization", "parameters", "takes"),
    [("auto", False, "none", 99, True), ("auto", False, "nf4", 1, False), ("auto", True, "nf4", 10, True),
     ("auto", True, "none", 40, False), ("vllm", False, "nf4", 99, True), ("transformers", True, "none", 1, False)],
)  # fmt: skip
def test_vllm_is_taken_where_it_answers_as_well(wanted, gpu, quantization, parameters, takes, monkeypatch) -> None:
    monkeypatch.setattr(generation.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(generation.torch.cuda, "mem_get_info", lambda: (100, 100))

    class Loaded:
        def num_parameters(self) -> int:
            return parameters

    model = generation.Model(BaseModelSpec(model_name_or_path="unused", quantization=quantization))
    assert generation.takes_vllm(model, EvaluationSpec(generation=wanted), Loaded()) is takes
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda *_: None)
    assert generation.takes_vllm(model, EvaluationSpec(), Loaded()) is False


def test_merged_weights_have_their_own_tokenizer_and_others_the_bases(home: Path) -> None:
    spec = BaseModelSpec(model_name_or_path=str(home / "bases" / "tiny"))
    own = generation.Model(spec, merged=str(home / "bases" / "tiny")).tokenizer()
    assert own.get_vocab() == generation.Model(spec).tokenizer().get_vocab()
