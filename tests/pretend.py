"""A pretend accelerator: a device of torch that computes on the CPU and refuses what CUDA refuses.

    with pretend.device() as name:                       # "pretend"
        torch.ones(3, device=name) @ torch.ones(3)       # RuntimeError: Expected all tensors to be on the same device

Each of its tensors wraps one on the CPU, which every operation is forwarded to. The rules are CUDA's: zero-dimensional
tensors on the CPU may take part in element-wise operations, and tensors on the CPU may index one on the device; copies
work in all directions; nothing else mixes. Random numbers on the device need a generator of the device, numpy cannot
read its tensors, and a checkpoint restores tensors to the device unless map_location says otherwise.

It does not reproduce speed, synchronisation, the order of summation, or running out of memory.
"""
import contextlib
import functools
import importlib
from unittest import mock

import torch
from torch.utils import backend_registration
from torch.utils._device import _device_constructors
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

NAME = "pretend"
SETUP = "_setup_privateuseone_for_python_backend"  # torch 2.13 has it, 2.6 has not
# Operations that torch does not mark as pointwise but that accept a number on the CPU as well.
NUMBERS = {"fill_", "masked_fill", "masked_fill_", "rsub"}
COPIES = {"copy_", "_to_copy"}
# Torch's own implementation would resize an empty tensor on the device, which a wrapped one cannot do.
GROWING = [("arange", "default"), ("arange", "start"), ("arange", "start_step"), ("eye", "default"), ("eye", "m")]
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}

CPU, PLAIN = torch.device("cpu"), {int, float, bool, type(None), torch.dtype}
torch_load, torch_tensor, TorchGenerator = torch.load, torch.tensor, torch.Generator


def why_not():
    """The reason why the pretend device cannot be registered here, a sentence; None if it can."""
    if not hasattr(backend_registration, SETUP):
        return f"torch {torch.__version__} does not support devices written in Python"
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != NAME:
        return "torch supports one kind of accelerator at a time, and this machine has a real one"


def is_ours(device):
    return device is not None and torch.device(device).type == NAME


class Tensor(torch.Tensor):
    """A tensor on the pretend device; `inner` is the one on the CPU that holds its numbers."""
    is_cuda = True  # so that the product takes its CUDA branches
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=torch.device(NAME, 0))
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return call(op, *args, **kwargs or {})

    def __getitem__(self, index):
        return super().__getitem__(of_lists(index))

    def __setitem__(self, index, value):
        super().__setitem__(of_lists(index), value)

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        dtype = dtype or (None if isinstance(data, torch.Tensor) else self.dtype)
        return torch.tensor(data, dtype=dtype, device=device or self.device, requires_grad=requires_grad)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
                        "to host memory first.")

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def __repr__(self, **options):
        return f"{self.cpu()!r} on {self.device}"

    def __reduce_ex__(self, protocol):
        build = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return build, (self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)


def check(op, args, kwargs, others):
    """Raise CUDA's error if an operation mixes tensors of the device with `others` on the CPU where CUDA forbids it."""
    name = op._schema.name.removeprefix("aten::")
    if name in COPIES:
        return
    if name in INDEXED:
        if not isinstance(args[0], Tensor) and any(isinstance(x, Tensor) for x in args[1]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        right = isinstance(args[0], Tensor) and all(isinstance(x, Tensor) or not x.dim() for x in args[2:3])
    else:
        numbers = torch.Tag.pointwise in op.tags or name in NUMBERS or name.startswith("_foreach_")
        written = args[0] if name.endswith("_") else kwargs.get("out")
        right = numbers and not any(x.dim() or x is written for x in others)
    if not right:
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, "
                           f"{NAME}:0 and cpu! (in {op})")


@functools.cache
def writes(op):
    """Whether an operation writes to its arguments, and whether it then changes their shapes."""
    return op._schema.is_mutable, torch.Tag.inplace_view in op.tags


def call(op, *args, **kwargs):
    """Run an operation on the CPU; its results are on the device unless the arguments ask for the CPU."""
    wrapped, others = [], []

    def down(x):
        kind = type(x)
        if kind is Tensor:
            wrapped.append(x)
            return x.inner
        if kind in PLAIN:
            return x
        if kind is list or kind is tuple:
            return kind(map(down, x))
        if isinstance(x, torch.Tensor):
            others.append(x)
        return CPU if kind is torch.device and x.type == NAME else x
    inner_args, inner_kwargs = [*map(down, args)], {key: down(value) for key, value in kwargs.items()}
    if wrapped and others:
        check(op, args, kwargs, others)
    result, same = op(*inner_args, **inner_kwargs), {}
    mutable, reshapes = writes(op)
    if mutable:  # an in-place operation returns its argument
        same = {id(x.inner): x for x in wrapped} | {id(x): x for x in others}
        if reshapes:
            with no_dispatch():  # updates the shape that the wrapper reports
                op(*args, **kwargs)
        if any(x.shape != x.inner.shape for x in wrapped):
            raise NotImplementedError(f"{op}: resizes a tensor on the pretend device")
    if kwargs.get("device") is not None and not is_ours(kwargs["device"]):
        return result

    def up(x):
        if type(x) is list or type(x) is tuple:
            return type(x)(map(up, x))
        return (same[id(x)] if id(x) in same else Tensor(x)) if isinstance(x, torch.Tensor) else x
    return up(result)


class Generator(TorchGenerator):
    """torch.Generator that also accepts the device, for which it draws the same numbers as for the CPU."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu" if is_ours(device) else device)
        self.on = torch.device(NAME, 0) if is_ours(device) else super().device.__get__(self)
        return self

    @property
    def device(self):
        return self.on

    def set_state(self, state):
        if isinstance(state, Tensor):
            raise TypeError(f"expected a torch.ByteTensor, but got one on {state.device}")
        return super().set_state(state)


def of_numbers(function):
    """Wrap torch.tensor and similar functions, which torch does not dispatch to a device written in Python."""
    def made(data, *, device=None, requires_grad=False, **kwargs):
        device = device or (data.device if isinstance(data, torch.Tensor) else None)
        if isinstance(data, torch.Tensor) and function is not torch_tensor:
            return function(data, device=device, **kwargs)
        data = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, data)
        kwargs |= {"device": "cpu" if is_ours(device) else device}
        made = function(data, **kwargs)
        return (made.to(device) if is_ours(device) else made).requires_grad_(requires_grad)
    return made


def drawn(function):
    """Wrap a random function: raise CUDA's error if the result and the generator are on different devices."""
    def draw(*args, **kwargs):
        result, generator = function(*args, **kwargs), kwargs.get("generator")
        if generator is not None and generator.device.type != result.device.type:
            raise RuntimeError(f"Expected a '{result.device.type}' device type for generator but found "
                               f"'{generator.device.type}'")
        return result
    return draw


def of_lists(index):
    """An index with its lists converted to tensors, as torch does on the device."""
    parts = [torch.as_tensor(x, dtype=torch.bool if x and isinstance(x[0], bool) else torch.long)
             if isinstance(x, list) else x for x in (index if isinstance(index, tuple) else [index])]
    return tuple(parts) if isinstance(index, tuple) else parts[0]


DRAWN = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")
FACTORIES = {name: of_numbers(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")} | {
    name: drawn(getattr(torch, name)) for name in DRAWN}
for name in ("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "multinomial"):
    setattr(Tensor, name, drawn(getattr(torch.Tensor, name)))


def load(file, map_location=None, **options):
    """torch.load that can also load to the device."""
    if isinstance(map_location, (str, torch.device)) and is_ours(map_location):
        there = torch_load(file, map_location="cpu", **options)
        return tree_map(lambda x: x.to(map_location) if isinstance(x, torch.Tensor) else x, there)
    return torch_load(file, map_location=map_location, **options)


@contextlib.contextmanager
def device():
    """Context in which the pretend device exists; gives its name. Raises RuntimeError with the reason of `why_not`."""
    if why_not():
        raise RuntimeError(why_not())
    if not hasattr(torch, NAME):  # once per process, which cannot be undone
        torch.ones((), requires_grad=True).backward()  # starts autograd without threads, with which no test could fork
        getattr(backend_registration, SETUP)(NAME)
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.float16]  # torch.utils.checkpoint asks for it
        fallback, kernels = device.registered = [torch.library.Library(name, "IMPL") for name in ("_", "aten")]
        fallback.fallback(call, "PrivateUse1")
        for packet, overload in GROWING:
            op = getattr(getattr(torch.ops.aten, packet), overload)
            kernels.impl(op._schema.name + (f".{overload}" * (overload != "default")), functools.partial(call, op),
                         "PrivateUse1")
    parallel = torch.autograd.is_multithreading_enabled()
    _device_constructors()  # torch caches a list of its own functions, which those of FACTORIES call in the end
    optimiser = importlib.import_module("torch.optim.optimizer")  # its multi-tensor code accepts no subclasses
    types = [*optimiser._foreach_supported_types, Tensor]
    with mock.patch.multiple(torch, Generator=Generator, load=load, **FACTORIES), \
            mock.patch.object(optimiser, "_foreach_supported_types", types):
        # autograd starts its device threads at the first backward pass, perhaps before this device was registered
        torch.autograd.set_multithreading_enabled(False)
        try:
            yield NAME
        finally:
            torch.autograd.set_multithreading_enabled(parallel)
