"""A simulated CUDA device: torch's own dispatcher, autograd and autocast over the CPU's memory and kernels.

`install()` makes `torch.device("cuda")` work in a CPU build of torch, until the process ends. Its tensors are
real ones of type cuda whose pointer is CPU memory; they are created through DLPack. Under the dispatch key
CUDA, each operator that has a CPU kernel gets a Python function that runs it on aliases of type cpu. So
everything above the kernels is torch's own: composite operators, TensorIterator's checks, autograd with its
device thread, autocast, `torch.cuda`. What CUDA's kernels and allocator do is added: refuse mixed devices and
wrong generators, count launches, waits and memory, run out of memory, leave new memory undefined, draw from a
generator of its own.

What it cannot show: the numerics of CUDA's kernels and which they lack, races between streams, speed, NCCL.
"""

import collections
import contextlib
import ctypes
import functools
import sys
import threading
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

CPU = torch._C.DispatchKey.CPU
NUMBERS = {"bool": (6, 8), "bfloat16": (4, 16), "float16": (2, 16), "float32": (2, 32), "float64": (2, 64)}
NUMBERS |= {
    f"{sign}int{bits}": (code, bits) for sign, code in (("", 0), ("u", 1)) for bits in (8, 16, 32, 64)
}
TYPES = {getattr(torch, name): numbers for name, numbers in NUMBERS.items()}  # in DLPack's words
Counter = collections.Counter


class Card:
    """State and counters of the device.

    Attributes:
        total: bytes that can be allocated.
        blocks: by pointer: the CPU storage, its bytes, and what DLPack needs.
        launches: kernels and copies started, by operator, approximately.
        waits: of the CPU for the device, by reason and line of the package.
        capture: the graph that is being captured; meanwhile a wait is an error.
    """

    def __init__(self) -> None:
        self.total, self.live, self.peak, self.reserved = 22 * 2**30, 0, 0, 0
        self.blocks: dict[int, tuple] = {}
        self.lock = threading.RLock()
        self.launches, self.waits = Counter(), Counter()
        self.capture: Graph | None = None

    def take(self, num_bytes: int) -> None:
        with self.lock:
            if self.live + num_bytes > self.total:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {num_bytes} bytes. (simulated)"
                )
            self.live += num_bytes
            self.peak, self.reserved = max(self.peak, self.live), max(self.reserved, self.live)

    def free(self, pointer: int) -> None:
        with self.lock:
            self.live -= self.blocks.pop(pointer)[1]

    def wait(self, what: str) -> None:
        if self.capture is not None:
            raise RuntimeError(f"operation not permitted while capturing: {what} in {site()} (simulated)")
        self.waits[what, site()] += 1


card = Card()


def site() -> str:
    """Return the innermost line of the package on the stack."""
    frame = sys._getframe(1)
    while frame and "/ctxkv_lib/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return (
        f"{frame.f_code.co_filename.rpartition('/ctxkv_lib/')[2]}:{frame.f_lineno}" if frame else "elsewhere"
    )


# Memory. DLPack's structures, and a capsule of them, say where a tensor lies and on what device.
class _Managed(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int * 2),
        ("ndim", ctypes.c_int),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_for_ever: list = []


def to_cuda(made: Tensor) -> Tensor:
    """Return the same memory as a tensor on cuda:0; nobody else may hold the CPU tensor `made`."""
    storage = made.untyped_storage()
    pointer, taken = storage.data_ptr(), -(-storage.nbytes() // 512) * 512
    card.take(taken)
    sizes = (ctypes.c_int64 * 2)(storage.nbytes() // made.element_size(), 1)
    where = ctypes.addressof(sizes)
    managed = _Managed(pointer, (2, 0), 1, *TYPES[made.dtype], 1, where, where + 8, 0, None, None)
    flat = torch._C._from_dlpack(_capsule(ctypes.addressof(managed), b"dltensor", None))
    if pointer:  # torch keeps a storage's Python object as long as the storage itself
        ended = weakref.ref(flat.untyped_storage(), lambda _: card.free(pointer))
        card.blocks[pointer] = (storage, taken, managed, sizes, ended)
    else:
        _for_ever.append((managed, sizes))
    return _view(flat, made)


def _view(base: Tensor, like: Tensor) -> Tensor:
    """Return a view of the storage of `base` with the shape of `like`."""
    return torch.ops.aten.as_strided.default._op_dk(
        CPU, base, like.size(), like.stride(), like.storage_offset()
    )


def to_cpu(held: Tensor) -> Tensor:
    """Return the same memory as a tensor on the CPU; a CPU tensor is returned as it is."""
    if held.device.type != "cuda":
        return held
    pointer = held.untyped_storage().data_ptr()
    if not pointer:
        return torch.empty_strided(held.size(), held.stride(), dtype=held.dtype)
    return torch.empty(0, dtype=held.dtype).set_(
        card.blocks[pointer][0], held.storage_offset(), held.size(), held.stride()
    )


# Random numbers
_Generator, _generators = torch.Generator, weakref.WeakValueDictionary()


class Generator(_Generator):
    """`torch.Generator` that can be one of cuda: inside, one of the CPU."""

    def __new__(cls, device="cpu"):
        if torch.device(device).type != "cuda":
            return _Generator(device)
        made = super().__new__(cls)
        _generators[made._cdata] = made  # operators get another Python object of the same generator
        return made

    device = property(lambda self: torch.device("cuda", 0))


@contextlib.contextmanager
def _drawing(op, values):
    """Inside, a random `op` draws from the device's own generator, unless one was passed."""
    given = [value for value in values if isinstance(value, _Generator)]
    if any(generator._cdata not in _generators for generator in given):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if given or torch.Tag.nondeterministic_seeded not in op.tags:
        yield
        return
    on_cpu, on_cuda = torch.default_generator, torch.cuda.default_generators[0]
    before = on_cpu.get_state()
    on_cpu.set_state(on_cuda.get_state())
    yield
    on_cuda.set_state(on_cpu.get_state())
    on_cpu.set_state(before)


def _refusing(function):
    """Return a random function that refuses a cuda generator for the CPU."""

    def call(*args, **kwargs):
        on = (
            args[0].device
            if args and isinstance(args[0], Tensor)
            else torch.device(kwargs.get("device") or "cpu")
        )
        if isinstance(kwargs.get("generator"), Generator) and on.type != "cuda":
            raise RuntimeError("Expected a 'cpu' device type for generator but found 'cuda'")
        return function(*args, **kwargs)

    return call


# Kernels
VIEWS = {"as_strided", "view", "_reshape_alias", "alias", "unfold", "set_", "detach"}
ALLOCATES = {"empty", "empty_strided", "resize_"}
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "multinomial"}
KERNELS = {"native_layer_norm_backward": 2, "nonzero": 3, "_unique2": 6, "sort": 4, "topk": 3}  # not 1 each
INDEXING = {"index", "_index_put_impl_", "index_put_"}


def _tensors(values) -> list[Tensor]:
    found: list[Tensor] = []
    _mapped(values, found.append)
    return found


def _mapped(values, change):
    """Change the tensors among arguments or results."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, list | tuple):
        return type(values)([_mapped(value, change) for value in values])
    if isinstance(values, dict):
        return {name: _mapped(value, change) for name, value in values.items()}
    return values


def _lay(tensor: Tensor) -> tuple:
    """Return where a tensor lies, and how."""
    return tensor.untyped_storage().data_ptr(), tensor.size(), tensor.stride()


def kernel(op, *args, **kwargs):
    """Run any operator that takes or makes a tensor on cuda."""
    name = op._schema.name.removeprefix("aten::")
    if name in VIEWS:
        return op._op_dk(CPU, *args, **kwargs)
    with torch._C._AutoDispatchBelowAutograd():
        _check(name, op, args, kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
        given: list[tuple[Tensor, Tensor, tuple]] = []  # on the CPU, on cuda, and how it lay

        def alias(tensor: Tensor) -> Tensor:
            on_cpu = to_cpu(tensor)
            if on_cpu is not tensor:
                given.append((on_cpu, tensor, _lay(on_cpu)))
            return on_cpu

        there, named = _mapped(list(args), alias), _mapped(kwargs, alias)
        for place, argument in enumerate(op._schema.arguments[: len(there)]):
            number = there[place]
            if isinstance(number, int | float) and str(argument.type) == "Tensor":  # which it was
                kind = torch.float64 if isinstance(number, float) else None
                there[place] = torch.tensor(number, dtype=kind)
        with _drawing(op, [*there, *named.values()]):
            found = op(*there, **named)
        if name.startswith("empty"):
            found.untyped_storage().fill_(1 if found.dtype == torch.bool else 255)  # undefined: NaN, -1
        for on_cpu, tensor, lay in given:
            if _lay(on_cpu) != lay:  # an `out` was resized
                made = to_cuda(on_cpu)
                torch.ops.aten.set_.source_Storage_storage_offset._op_dk(
                    CPU, tensor, made.untyped_storage(), made.storage_offset(), made.size(), made.stride()
                )
        same = {id(on_cpu): tensor for on_cpu, tensor, _ in given}
        stored = {lay[0]: tensor for _, tensor, lay in given if lay[0]}

        def back(tensor: Tensor) -> Tensor:
            if id(tensor) in same:
                return same[id(tensor)]
            base = stored.get(tensor.untyped_storage().data_ptr())
            return to_cuda(tensor) if base is None else _view(base, tensor)

        made = _mapped(found, back)
        if card.capture is not None:
            card.capture.calls.append((functools.partial(kernel, op), args, kwargs, made))
        return made


def _check(name: str, op, args, kwargs) -> None:
    """Refuse what CUDA's kernels refuse, and count the rest.

    Scalars may be on the CPU, and indices into a tensor on cuda.
    """
    indices = _tensors([args[1]]) if name in INDEXING else []
    tensors = [
        each for each in _tensors([*args, *kwargs.values()]) if all(each is not index for index in indices)
    ]
    others = [tensor for tensor in tensors if tensor.device.type != "cuda" and tensor.dim()]
    if others and (len(others) < len(tensors) or indices):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name}; simulated)"
        )
    if name in ALLOCATES:
        return
    card.launches[name] += KERNELS.get(name, 1)
    for index in indices if len(args) > 2 else ():  # before `index`, torch has brought them there already
        if index.device.type != "cuda":
            card.wait("copy to device")
        elif index.dtype == torch.bool and args[2].numel() > 1:  # else it is a masked_fill
            card.wait("nonzero")
    repeats = name == "repeat_interleave" and op._overloadname == "Tensor" and not kwargs.get("output_size")
    if name in WAITS or repeats:
        card.wait(name)


def copy_(self, src, non_blocking=False):
    """Copy between the devices, or on cuda."""
    ways = {(True, True): "on device", (True, False): "to device", (False, True): "to host"}
    way = ways[self.device.type == "cuda", src.device.type == "cuda"]
    card.launches[f"copy {way}"] += 1
    if way == "to host" and non_blocking:
        raise RuntimeError(
            f"a copy to the host is read before it has come: non_blocking, in {site()} (simulated)"
        )
    if way != "on device" and not (non_blocking and is_pinned(src)):
        card.wait(f"copy {way}")
    with torch._C._AutoDispatchBelowAutograd():
        to_cpu(self).copy_(to_cpu(src))
    if card.capture is not None:
        card.capture.calls.append((copy_, (self, src, non_blocking), {}, self))
    return self


def _to_copy(
    self, *, dtype=None, layout=None, device=None, pin_memory=None, non_blocking=False, memory_format=None
):
    """As torch's own, without a pinned buffer for copies that do not wait."""
    form = memory_format or torch.preserve_format
    return torch.empty_like(self, dtype=dtype, device=device or self.device, memory_format=form).copy_(
        self, non_blocking
    )


class Graph:
    """A CUDA graph: the calls of a capture, repeated on the same memory."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def replay(self) -> None:
        launches = Counter(card.launches)
        with torch._C._AutoDispatchBelowAutograd():
            for call, args, kwargs, made in self.calls:
                for old, new in zip(_tensors([made]), _tensors([call(*args, **kwargs)]), strict=True):
                    if old is not new:
                        to_cpu(old).copy_(to_cpu(new))
        card.launches = launches + Counter(["graph"])


@contextlib.contextmanager
def capturing(graph: Graph, stream=None, capture_error_mode="global"):
    """Record what is done inside, and leave memory and random numbers as they were."""
    held = {pointer: (block, block[0].clone()) for pointer, block in card.blocks.items()}
    draws = torch.cuda.default_generators[0].get_state()
    card.capture = graph
    try:
        yield
    finally:
        card.capture = None
        for pointer, (block, content) in held.items():
            if card.blocks.get(pointer) is block:
                block[0].copy_(content)
        torch.cuda.default_generators[0].set_state(draws)


_pinned: set[int] = set()  # pointers


def is_pinned(tensor: Tensor, device=None) -> bool:
    return tensor.untyped_storage().data_ptr() in _pinned


def pin_memory(tensor: Tensor, device=None) -> Tensor:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
    made = torch.empty_like(tensor).copy_(tensor)
    pointer = made.untyped_storage().data_ptr()
    _pinned.add(pointer)
    weakref.finalize(made.untyped_storage(), _pinned.discard, pointer)
    return made


def _tell_cpp() -> None:
    """Register a CUDA device guard that does nothing, and an accelerator for autograd, in torch's C++.

    torch replaces a guard that counts no devices by one that does nothing: so it first gets a C++ object
    whose virtual functions all return 0. The hooks of the missing CUDA library are changed to say that CUDA
    and its context exist; which of their functions say so is found by trying. This relies on Linux's C++ and
    on the internals of this version of torch: with another it fails here, not later.
    """
    folder = Path(torch.__file__).parent / "lib"
    c10, aten = (ctypes.CDLL(str(folder / name)) for name in ("libc10.so", "libtorch_cpu.so"))
    no = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    functions = (ctypes.c_void_p * 64)(*[ctypes.cast(no, ctypes.c_void_p).value] * 64)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(functions))
    registry = (ctypes.c_void_p * 2).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    registry[1] = ctypes.addressof(guard)  # DeviceType::CUDA
    torch._C._ensureCUDADeviceGuardSet()
    assert registry[1] != ctypes.addressof(guard)
    yes = ctypes.cast(
        aten._ZN2at7Context9hasOpenMPEv, ctypes.c_void_p
    ).value  # any function that returns true
    get_hooks = aten._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get_hooks())
    copied = ctypes.c_void_p * 42  # two words, and the first 40 virtual functions
    virtual = copied.from_buffer_copy(copied.from_address(hooks.value - 16))
    hooks.value = ctypes.addressof(virtual) + 16
    _for_ever.extend((no, functions, guard, virtual))

    def backward_works() -> bool:
        try:
            torch.ones((), device="cuda", requires_grad=True).exp().backward()
        except RuntimeError:
            return False
        return True

    for works in (lambda: torch._C._accelerator_getAccelerator().type == "cuda", backward_works):
        for place in range(4, 42):
            was, virtual[place] = virtual[place], yes
            if works():
                break
            virtual[place] = was
        else:
            raise RuntimeError("this version of torch has other hooks")


def _stats(_) -> dict:
    sizes = {"allocated_bytes": (card.live, card.peak), "reserved_bytes": (card.reserved, card.reserved)}
    return {name: {"all": {"current": now, "peak": most}} for name, (now, most) in sizes.items()}


def _reset_peak(_) -> None:
    if not torch.cuda.is_initialized():
        raise RuntimeError("Invalid device argument 0: did you call init?")
    card.peak = card.live


def install() -> Card:
    """Give this process a GPU, until it ends."""
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _for_ever.extend((everything, aten))
    everything.fallback(kernel, "CUDA")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of composite kernels for any device, a warning names those replaced
        for full in torch._C._dispatch_get_all_op_names():
            base, _, overload = full.removeprefix("aten::").partition(".")
            if not full.startswith("aten::") or base in ("copy_", "_to_copy"):
                continue
            structured = has(
                full, "CompositeExplicitAutogradNonFunctional"
            )  # torch makes the result, and calls `out`
            if (has(full, "CPU") and not structured) or base.startswith("_foreach_"):
                op = getattr(getattr(torch.ops.aten, base), overload or "default")
                aten.impl(full.removeprefix("aten::"), functools.partial(kernel, op), "CUDA")
        aten.impl("copy_", copy_, "CUDA")
        aten.impl("_to_copy", _to_copy, "CUDA")
    torch.Generator = Generator
    for owner, names in (
        (torch, "rand randn randint randperm normal bernoulli multinomial"),
        (Tensor, "normal_ uniform_ random_ bernoulli_ exponential_"),
    ):
        for name in names.split():
            setattr(owner, name, _refusing(getattr(owner, name)))
    Tensor.pin_memory, Tensor.is_pinned = pin_memory, is_pinned
    first = lambda *_: 0  # noqa: E731
    functions = {
        "getDeviceCount": lambda: 1,
        "getDevice": first,
        "init": lambda: setattr(torch.cuda, "default_generators", (Generator("cuda"),)),
        "memoryStats": _stats,
        "resetPeakMemoryStats": _reset_peak,
        "emptyCache": lambda: setattr(card, "reserved", card.live),
        "synchronize": lambda: card.wait("synchronize"),
    }
    for name, function in functions.items():
        setattr(torch._C, f"_cuda_{name}", function)
    cuda = torch.cuda
    cuda._exchange_device = cuda._maybe_exchange_device = first
    cuda._cudart = SimpleNamespace(cudaMemGetInfo=lambda _: (card.total - card.reserved, card.total))
    cuda._get_device_properties = lambda _: SimpleNamespace(
        name="NVIDIA L4 (simulated)", major=8, minor=9, total_memory=card.total, multi_processor_count=58
    )
    streams = SimpleNamespace(wait_stream=first)
    cuda.Stream = cuda.current_stream = lambda *_: streams
    cuda.stream, cuda.CUDAGraph, cuda.graph = contextlib.nullcontext, Graph, capturing
    captures = lambda: card.capture is not None  # noqa: E731
    cuda.is_current_stream_capturing = cuda.graphs.is_current_stream_capturing = captures
    _tell_cpp()
    return card
