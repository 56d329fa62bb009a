"""The functions and the tensor structure of ggml that abcli uses, each under its C prototype."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from functools import cache
from typing import Any

import llama_cpp.llama_cpp as llama

from abcli.errors import NativeError

BACKEND_DEVICE_TYPE_CPU = 0
# ggml_tensor is about 400 bytes with its bookkeeping.
BYTES_PER_TENSOR = 1024
MODE_NORMAL = 0
MODE_NEOX = 2
# ggml.h; the bindings do not name it.
GGML_TYPE_BF16 = 30
GGML_TYPE_I64 = 27
NUMBER_BYTES = {llama.GGML_TYPE_F32: 4, llama.GGML_TYPE_F16: 2, GGML_TYPE_BF16: 2}
# ggml divides the angle by this: where two bases turn a pair equally fast it must not turn at all.
NO_ROTATION = 1e30


class InitParameters(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class TensorStruct(ctypes.Structure):
    """struct ggml_tensor (ggml.h); `check_tensor_layout` proves that the library's has this form."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


def ggml_function(name: str, restype: Any, *argtypes: Any) -> Any:
    """The C function `name`. Of all copies on the disk it is that of the library libllama itself loaded.

    The handle of libllama also finds what libllama is linked to; other copies have other globals.
    """
    function = getattr(llama._lib, name)
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


_pointer, _size, _int, _int64, _float, _text = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
    ctypes.c_char_p,
)

# struct ggml_context * ggml_init(struct ggml_init_params params);
init = ggml_function("ggml_init", _pointer, InitParameters)
# void ggml_free(struct ggml_context * ctx);
free = ggml_function("ggml_free", None, _pointer)
# struct ggml_tensor * ggml_new_tensor_1d(struct ggml_context * ctx, enum ggml_type type, int64_t ne0);
new_1d = ggml_function("ggml_new_tensor_1d", _pointer, _pointer, _int, _int64)
# struct ggml_tensor * ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
new_3d = ggml_function("ggml_new_tensor_3d", _pointer, _pointer, _int, *[_int64] * 3)
# struct ggml_tensor * ggml_view_4d(ctx, a, ne0, ne1, ne2, ne3, nb1, nb2, nb3, offset);
view_4d = ggml_function("ggml_view_4d", _pointer, _pointer, _pointer, *[_int64] * 4, *[_size] * 3, _size)
# struct ggml_tensor * ggml_rope_ext(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor,
#     attn_factor, beta_fast, beta_slow);
rope = ggml_function("ggml_rope_ext", _pointer, *[_pointer] * 4, *[_int] * 3, *[_float] * 6)
# struct ggml_tensor * ggml_rope_ext_inplace(the same arguments);
rope_inplace = ggml_function("ggml_rope_ext_inplace", _pointer, *[_pointer] * 4, *[_int] * 3, *[_float] * 6)
# struct ggml_tensor * ggml_cpy(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
copy = ggml_function("ggml_cpy", _pointer, _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_mul(ctx, a, b); b is repeated where it has one number and a has several.
multiply = ggml_function("ggml_mul", _pointer, _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
matrix_product = ggml_function("ggml_mul_mat", _pointer, *[_pointer] * 3)
# struct ggml_tensor * ggml_add(ctx, a, b);
add = ggml_function("ggml_add", _pointer, _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_cont(struct ggml_context * ctx, struct ggml_tensor * a);
contiguous = ggml_function("ggml_cont", _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_concat(ctx, a, b, int dim);
concatenate = ggml_function("ggml_concat", _pointer, _pointer, _pointer, _pointer, _int)
# struct ggml_tensor * ggml_reshape_3d(ctx, a, ne0, ne1, ne2);
reshape_3d = ggml_function("ggml_reshape_3d", _pointer, _pointer, _pointer, *[_int64] * 3)
# struct ggml_tensor * ggml_div(ctx, a, b); as ggml_mul.
divide = ggml_function("ggml_div", _pointer, _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_neg(struct ggml_context * ctx, struct ggml_tensor * a);
negate = ggml_function("ggml_neg", _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_log(struct ggml_context * ctx, struct ggml_tensor * a);
logarithm = ggml_function("ggml_log", _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_soft_max(struct ggml_context * ctx, struct ggml_tensor * a); of each row.
soft_max = ggml_function("ggml_soft_max", _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_sum_rows(struct ggml_context * ctx, struct ggml_tensor * a);
sum_rows = ggml_function("ggml_sum_rows", _pointer, _pointer, _pointer)
# struct ggml_tensor * ggml_pool_2d(ctx, a, enum ggml_op_pool op, int k0, k1, s0, s1, float p0, p1);
pool_2d = ggml_function("ggml_pool_2d", _pointer, _pointer, _pointer, *[_int] * 5, *[_float] * 2)
POOL_MAX, POOL_AVERAGE = 0, 1
# size_t ggml_used_mem(const struct ggml_context * ctx);
used_memory = ggml_function("ggml_used_mem", _size, _pointer)
# size_t ggml_get_mem_size(const struct ggml_context * ctx);
memory_size = ggml_function("ggml_get_mem_size", _size, _pointer)
# const char * ggml_op_desc(const struct ggml_tensor * t);
op_description = ggml_function("ggml_op_desc", _text, _pointer)
# struct ggml_tensor * ggml_set_name(struct ggml_tensor * tensor, const char * name);
set_name = ggml_function("ggml_set_name", _pointer, _pointer, _text)
# size_t ggml_tensor_overhead(void);
tensor_overhead = ggml_function("ggml_tensor_overhead", _size)
# size_t ggml_row_size(enum ggml_type type, int64_t ne);
row_size = ggml_function("ggml_row_size", _size, _int, _int64)
# size_t ggml_nbytes(const struct ggml_tensor * tensor);
tensor_bytes = ggml_function("ggml_nbytes", _size, _pointer)
# struct ggml_cgraph * ggml_new_graph(struct ggml_context * ctx);
new_graph = ggml_function("ggml_new_graph", _pointer, _pointer)
# struct ggml_cgraph * ggml_new_graph_custom(struct ggml_context * ctx, size_t size, bool grads);
new_graph_custom = ggml_function("ggml_new_graph_custom", _pointer, _pointer, _size, ctypes.c_bool)
# size_t ggml_graph_overhead_custom(size_t size, bool grads);
graph_overhead = ggml_function("ggml_graph_overhead_custom", _size, _size, ctypes.c_bool)
# int ggml_graph_n_nodes(struct ggml_cgraph * cgraph);
node_count = ggml_function("ggml_graph_n_nodes", _int, _pointer)
# struct ggml_tensor ** ggml_graph_nodes(struct ggml_cgraph * cgraph);
graph_nodes = ggml_function("ggml_graph_nodes", _pointer, _pointer)
# struct ggml_tensor * ggml_graph_get_tensor(const struct ggml_cgraph * cgraph, const char * name);
graph_tensor = ggml_function("ggml_graph_get_tensor", _pointer, _pointer, _text)
# enum ggml_status ggml_backend_sched_graph_compute_async(ggml_backend_sched_t sched, struct ggml_cgraph * graph);
scheduler_compute = ggml_function("ggml_backend_sched_graph_compute_async", _int, _pointer, _pointer)
# void ggml_backend_tensor_get_async(backend, const struct ggml_tensor * tensor, void * data, offset, size);
tensor_get_async = ggml_function("ggml_backend_tensor_get_async", None, *[_pointer] * 3, *[_size] * 2)
# void ggml_backend_tensor_copy(const struct ggml_tensor * src, struct ggml_tensor * dst);
tensor_copy = ggml_function("ggml_backend_tensor_copy", None, _pointer, _pointer)
# ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors(struct ggml_context * ctx, ggml_backend_t backend);
allocate = ggml_function("ggml_backend_alloc_ctx_tensors", _pointer, _pointer, _pointer)
# void ggml_build_forward_expand(struct ggml_cgraph * cgraph, struct ggml_tensor * tensor);
expand = ggml_function("ggml_build_forward_expand", None, _pointer, _pointer)
# ggml_backend_buffer_t ggml_backend_cpu_buffer_from_ptr(void * ptr, size_t size);
buffer_from = ggml_function("ggml_backend_cpu_buffer_from_ptr", _pointer, _pointer, _size)
# ggml_backend_buffer_t ggml_backend_buft_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size);
buffer_alloc = ggml_function("ggml_backend_buft_alloc_buffer", _pointer, _pointer, _size)
# bool ggml_backend_buffer_is_host(ggml_backend_buffer_t buffer);
buffer_is_host = ggml_function("ggml_backend_buffer_is_host", ctypes.c_bool, _pointer)
# void * ggml_backend_buffer_get_base(ggml_backend_buffer_t buffer);
buffer_base = ggml_function("ggml_backend_buffer_get_base", _pointer, _pointer)
# ggml_backend_buffer_type_t ggml_backend_buffer_get_type(ggml_backend_buffer_t buffer);
buffer_type = ggml_function("ggml_backend_buffer_get_type", _pointer, _pointer)
# void ggml_backend_buffer_free(ggml_backend_buffer_t buffer);
buffer_free = ggml_function("ggml_backend_buffer_free", None, _pointer)
# ggml_backend_dev_t ggml_backend_buft_get_device(ggml_backend_buffer_type_t buft);
type_device = ggml_function("ggml_backend_buft_get_device", _pointer, _pointer)
# ggml_backend_buffer_type_t ggml_backend_dev_buffer_type(ggml_backend_dev_t device);
device_buffer_type = ggml_function("ggml_backend_dev_buffer_type", _pointer, _pointer)
# ggml_backend_buffer_type_t ggml_backend_dev_host_buffer_type(ggml_backend_dev_t device); NULL if it has none.
device_host_buffer_type = ggml_function("ggml_backend_dev_host_buffer_type", _pointer, _pointer)
# enum ggml_backend_dev_type ggml_backend_dev_type(ggml_backend_dev_t device);
device_type = ggml_function("ggml_backend_dev_type", _int, _pointer)
# ggml_backend_dev_t ggml_backend_dev_by_type(enum ggml_backend_dev_type type);
device_by_type = ggml_function("ggml_backend_dev_by_type", _pointer, _int)
# bool ggml_backend_dev_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op);
device_supports = ggml_function("ggml_backend_dev_supports_op", ctypes.c_bool, _pointer, _pointer)
# ggml_backend_t ggml_backend_dev_init(ggml_backend_dev_t device, const char * params);
device_init = ggml_function("ggml_backend_dev_init", _pointer, _pointer, _text)
# enum ggml_status ggml_backend_tensor_alloc(ggml_backend_buffer_t buffer, struct ggml_tensor * tensor, void * addr);
place = ggml_function("ggml_backend_tensor_alloc", _int, _pointer, _pointer, _pointer)
# enum ggml_status ggml_backend_view_init(struct ggml_tensor * tensor);
view_init = ggml_function("ggml_backend_view_init", _int, _pointer)
# void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size);
tensor_set = ggml_function("ggml_backend_tensor_set", None, _pointer, _pointer, _size, _size)
# void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size);
tensor_get = ggml_function("ggml_backend_tensor_get", None, _pointer, _pointer, _size, _size)
# void ggml_backend_tensor_set_2d(tensor, data, offset, size, n_copies, stride_tensor, stride_data);
tensor_set_2d = ggml_function("ggml_backend_tensor_set_2d", None, _pointer, _pointer, *[_size] * 5)
# void ggml_backend_tensor_get_2d(the same arguments);
tensor_get_2d = ggml_function("ggml_backend_tensor_get_2d", None, _pointer, _pointer, *[_size] * 5)
# ggml_backend_t ggml_backend_init_by_type(enum ggml_backend_dev_type type, const char * params);
backend_by_type = ggml_function("ggml_backend_init_by_type", _pointer, _int, _text)
# void ggml_backend_free(ggml_backend_t backend);
backend_free = ggml_function("ggml_backend_free", None, _pointer)
# enum ggml_status ggml_backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph * cgraph);
compute = ggml_function("ggml_backend_graph_compute", _int, _pointer, _pointer)
# void ggml_backend_cpu_set_n_threads(ggml_backend_t backend_cpu, int n_threads);
set_threads = ggml_function("ggml_backend_cpu_set_n_threads", None, _pointer, _int)


def new_context(stack: ExitStack, size: int) -> int:
    """A context with room for `size` bytes of tensors without their numbers, freed with `stack`. Raises NativeError."""
    context = init(InitParameters(size, None, True))
    if not context:
        raise NativeError("ggml has no memory for a graph", "close other programs")
    stack.callback(free, context)
    return int(context)


_operations: dict[int, bytes] = {}


def operation(number: int, tensor: int) -> bytes:
    """The name of operation `number` (ggml_op), which is that of `tensor`: "ROPE", "SET_ROWS", ..."""
    name = _operations.get(number)
    if name is None:
        # Unary operations and GLU share a number, and go by names of their own; nobody here asks for them.
        name = _operations[number] = bytes(op_description(tensor))
    return name


def check(status: int) -> None:
    """Raise NativeError unless `status` (ggml_status) is success."""
    if status != 0:
        raise NativeError(f"ggml failed with status {status}", "report it with the model and the command line")


@cache
def check_tensor_layout() -> None:
    """Raise NativeError unless this ggml lays out tensors as `TensorStruct` says.

    Every field that abcli reads is compared with what ggml was told to write there.
    """
    with ExitStack() as stack:
        context = new_context(stack, 4 * tensor_overhead())
        keys, positions = new_3d(context, llama.GGML_TYPE_F32, 8, 3, 5), new_1d(context, llama.GGML_TYPE_I32, 5)
        view = view_4d(context, keys, 8, 3, 2, 1, 32, 96, 192, 96)
        rotated = rope(context, keys, positions, None, 6, MODE_NEOX, 77, 5e5, 0.5, 0.25, 1.5, 32.0, 2.0)
        set_name(rotated, b"abcli")
        first, second, third = (TensorStruct.from_address(tensor) for tensor in (keys, view, rotated))
        sound = (
            ctypes.sizeof(TensorStruct) <= tensor_overhead()
            and (first.type, first.op, list(first.ne)) == (llama.GGML_TYPE_F32, 0, [8, 3, 5, 1])
            and list(first.nb) == [4, 32, 96, 480]
            and (second.view_src, second.view_offs, second.src[0]) == (keys, 96, keys)
            and (third.name, third.src[0], third.src[1], third.src[2]) == (b"abcli", keys, positions, None)
            and op_description(rotated) == b"ROPE"
            and third.view_src is None
            and third.data is None
            and rope_numbers(third) == (6, MODE_NEOX, 77, 5e5, 0.5, 0.25, 1.5, 32.0, 2.0, 0)
        )
    if not sound:
        raise NativeError(
            "this llama.cpp lays out tensors in a way unknown to abcli", "install llama-cpp-python 0.3.36 (make setup)"
        )


def rope_numbers(tensor: TensorStruct) -> tuple[int, int, int, float, float, float, float, float, float, int]:
    """The parameters of a ROPE operation (`ggml_rope_impl`), from its op_params.

    Dimensions, mode, original context, base, scale, extrapolation factor, attention factor, beta fast, beta slow, and
    the first rotated dimension.
    """
    whole = tensor.op_params
    numbers = (ctypes.c_float * 6).from_buffer(whole, 5 * 4)
    first, second, third, fourth, fifth, sixth = numbers
    return (whole[1], whole[2], whole[4], first, second, third, fourth, fifth, sixth, whole[15])
