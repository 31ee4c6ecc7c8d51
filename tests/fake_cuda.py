"""A GPU for a machine without one: its tensors have a device, a shape and a type, but nothing in them.

What a pass asks of it goes through torch's own rules for shapes and devices (``FakeTensorMode``). So it shows tensors
that are on the wrong device, and what waits for the device; not one number. Autograd needs a guard for the device,
which a CPU build of torch has not: a few lines of C++, loaded before torch.

As a program, in the ``environment`` that has the guard, it drives an engine over the base in a directory with mixed
trials, and prints what it saw as one JSON line.
"""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  before there seems to be a GPU, or it would look for its kernels
import peft  # noqa: F401
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device; using c10::DeviceIndex; using c10::EventFlag; using c10::Stream;
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override { *event = this_event; }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void* this_event = &this_event;
};
struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at { C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks) }
"""

TRIALS = ((8, 0.0), (8, 0.0), (8, 0.1), (8, 0.1), (16, 0.1))
"""Rank and dropout: two stacks, and one by itself."""


def environment(scratch: Path) -> dict[str, str]:
    """With what a process of Python has the guard; compiles it into ``scratch``."""
    home = Path(torch.__file__).parent
    source, library = scratch / "guard.cpp", scratch / "guard.so"
    source.write_text(GUARD, encoding="utf-8")
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"-L{home}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", str(source), "-o", str(library), *options], check=True)
    return dict(os.environ) | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": f"{home}/lib"}


class Waits(collections.Counter[str]):
    """For the device, by what waited and where in our own code."""

    def note(self, what: str) -> None:
        own = [frame for frame in traceback.extract_stack() if "/trainables/" in frame.filename]
        self[f"{what} in {Path(own[-1].filename).stem}.{own[-1].name}" if own else what] += 1


class FakeCuda(TorchDispatchMode):
    """Calls that concern the device are worked out without it, all others are made."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits, self.fake = waits, FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorMode.avoid_device_init = True  # type: ignore[assignment, method-assign]
        fake_tensor.init_gpu_context = lambda *_: None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked more often than all else together
        kwargs = kwargs or {}
        leaves = torch.utils._pytree.arg_tree_leaves(*args, **kwargs)
        if not any(isinstance(leaf, FakeTensor) or leaf == torch.device("cuda", 0) for leaf in leaves if _kind(leaf)):
            return func(*args, **kwargs)
        name = str(func).split(".")[1]
        if name in ("copy_", "_to_copy"):
            there, here = kwargs.get("device") or args[0].device, args[-1 if name == "_to_copy" else 1].device
            if there.type != here.type and True not in (*args[2:], kwargs.get("non_blocking")):
                self.waits.note("copy")
        with self.fake:
            return func(*args, **kwargs)

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.fake.from_tensor(tensor.detach().as_subclass(torch.Tensor)).to("cuda:0")


def _kind(leaf: object) -> bool:
    return isinstance(leaf, FakeTensor | torch.device)


def install(waits: Waits) -> FakeCuda:
    """Make this process have a GPU; what it is asked to tell is ones, and noted as a wait."""
    mode = FakeCuda(waits)

    def tells(name: str, answer: Any) -> None:
        kind, real = FakeTensor if name in vars(FakeTensor) else torch.Tensor, getattr(torch.Tensor, name)

        def told(tensor: torch.Tensor, *args: Any) -> Any:
            if not isinstance(tensor, FakeTensor):
                return real(tensor, *args)
            waits.note(name)
            return answer(tensor)

        setattr(kind, name, told)

    for name, answer in {"item": 1.0, "__float__": 1.0, "__int__": 1, "__bool__": True}.items():
        tells(name, lambda _, answer=answer: answer)
    tells("tolist", lambda tensor: torch.ones(tensor.shape, device="cpu").tolist())
    torch.Tensor.pin_memory = lambda tensor: tensor  # type: ignore[method-assign, assignment]
    gib = 2**30
    answers = {
        "is_available": True, "current_device": 0, "empty_cache": None, "reset_peak_memory_stats": None,
        "_lazy_init": None, "memory_allocated": 0, "memory_reserved": 0, "max_memory_allocated": gib,
        "mem_get_info": (80 * gib, 80 * gib),
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    torch.cuda.synchronize = lambda *_: waits.note("synchronize")  # type: ignore[assignment]
    return mode


def _load_on_cpu_and_move(mode: FakeCuda) -> None:
    """A base comes to the device as it comes to a CPU: what bitsandbytes and transformers do there is theirs."""
    from trainables import base

    load, device = base.load_model, base.device

    def loaded(spec: Any, quantized: bool = True) -> Any:
        torch.cuda.is_available, base.device = (lambda: False), (lambda: torch.device("cpu"))
        try:
            model = load(spec, quantized)
        finally:
            torch.cuda.is_available, base.device = (lambda: True), device
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is None:
                    continue
                state, moved = getattr(weight, "quant_state", None), mode.move(weight)
                if state is None:
                    module._parameters[name] = torch.nn.Parameter(moved.to(torch.bfloat16), requires_grad=False)
                    continue
                del module._parameters[name]
                module.__dict__[name], moved.quant_state = moved, state
                for part in (state, state.state2):
                    for key, value in vars(part or object).copy().items():
                        if isinstance(value, torch.Tensor):
                            setattr(part, key, mode.move(value))
                state.dtype = torch.bfloat16
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else mode.move(buffer)
        return model

    base.load_model = loaded


class _Rows:
    """As much of a snapshot as an engine reads."""

    def rows(self, split: str) -> list[dict[str, Any]]:
        made, found = random.Random(split), []
        for _ in range(16):
            ids = [made.randrange(300) for _ in range(made.randrange(12, 60))]
            found.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
        return found


def main(directory: str) -> None:
    waits = Waits()
    mode = install(waits)
    from trainables import engine as engines
    from trainables import probe
    from trainables.contract import TrialConfig
    from trainables.spec import BaseModelSpec, TrainingSpec

    _load_on_cpu_and_move(mode)
    engines._ALIKE[torch.bfloat16] = float("inf")  # no loss is known
    spec = BaseModelSpec(model_name_or_path=directory)
    with mode, torch.autograd.set_multithreading_enabled(False):  # whose threads would know nothing of the mode
        engine = engines.Engine(spec, _Rows(), capacity=len(TRIALS), gradient_checkpointing=True)  # type: ignore[arg-type]
        largest = TrainingSpec(r=16, lora_dropout=0.1, evals_per_epoch=1)
        probe.memory(engine, largest)
        for k, (r, dropout) in enumerate(TRIALS):
            training = largest.model_copy(
                update={
                    "r": r,
                    "lora_dropout": dropout,
                    "num_train_epochs": 1,
                    "per_device_train_batch_size": (8, 4)[k % 2],
                    "gradient_accumulation_steps": (1, 2)[k % 2],
                    "seed": k,
                }
            )
            engine.admit(TrialConfig(f"t{k}", spec, training, "", 8))
        steps, events = list[dict[str, Any]](), list[str]()
        while engine.slots:
            waits.clear()
            before, found = engine.counters.passes, engine.advance()
            steps.append({"evaluated": bool(found), "passes": engine.counters.passes - before, "waits": dict(waits)})
            events += [getattr(event, "message", "evaluated") for event in found]
    print(json.dumps({"steps": steps, "events": events}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(*sys.argv[1:])
