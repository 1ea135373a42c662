// Declares blipfast's operators: one fragment, so that Python may add others to the namespace.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "attention.h"
#include "draw_negatives.h"
#include "few_rows_linear.h"
#include "isa.h"
#include "softmax_mean.h"
#include "training.h"
#include "varlen_attention.h"

namespace {

// The x86-64 level the kernels run at on this processor (4: AVX-512, 3: AVX2), or 0: portable.
int64_t native_isa_level() {
  return blipfast::isa_level();
}

bool native_amx_bf16() {
  return blipfast::amx_bf16_ready();
}

bool native_avx512_bf16() {
  return blipfast::avx512_bf16_ready();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(blipfast_native, m) {
  m.def("isa_level() -> int");
  m.def("amx_bf16() -> bool");
  m.def("avx512_bf16() -> bool");
  m.def(
      "softmax_mean(Tensor rows, Tensor keys, Tensor temperature, bool amx, bool avx512)"
      " -> (Tensor, Tensor)");
  m.def(
      "draw_negatives(Tensor scores, Tensor? query_ids, Tensor? key_ids, float eps, int offset,"
      " int seed, int step, int stream, int first_row, int first_column, int num) -> Tensor");
  m.def("few_rows_linear(Tensor rows, Tensor weight, Tensor bias, bool gelu, bool amx) -> Tensor");
  m.def(
      "attention_out(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, Tensor? cu_seqlens,"
      " Tensor? order, bool causal, float dropout_p, int seed, Tensor(a!) out) -> Tensor");
  m.def(
      "attention_backward_out(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse,"
      " Tensor? key_lengths, Tensor? cu_seqlens, Tensor? order, bool causal, float dropout_p,"
      " int seed, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
  m.def("varlen_attention(Tensor qkv, Tensor cu_seqlens, bool causal) -> Tensor");
  m.def("bias_gelu_out(Tensor x, Tensor bias, Tensor(a!) out) -> ()");
  m.def("gelu_backward_(Tensor(a!) grad, Tensor x, Tensor bias) -> (Tensor, Tensor)");
  m.def("dropout(Tensor x, float p, int seed) -> Tensor");
  m.def("transpose_and_sum(Tensor x) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(blipfast_native, CompositeExplicitAutograd, m) {
  m.impl("isa_level", TORCH_BOX(&native_isa_level));
  m.impl("amx_bf16", TORCH_BOX(&native_amx_bf16));
  m.impl("avx512_bf16", TORCH_BOX(&native_avx512_bf16));
}

STABLE_TORCH_LIBRARY_IMPL(blipfast_native, CPU, m) {
  m.impl("softmax_mean", TORCH_BOX(&blipfast::softmax_mean));
  m.impl("draw_negatives", TORCH_BOX(&blipfast::draw_negatives));
  m.impl("few_rows_linear", TORCH_BOX(&blipfast::few_rows_linear));
  m.impl("attention_out", TORCH_BOX(&blipfast::attention_out));
  m.impl("attention_backward_out", TORCH_BOX(&blipfast::attention_backward_out));
  m.impl("varlen_attention", TORCH_BOX(&blipfast::varlen_attention));
  m.impl("bias_gelu_out", TORCH_BOX(&blipfast::bias_gelu_out));
  m.impl("gelu_backward_", TORCH_BOX(&blipfast::gelu_backward_));
  m.impl("dropout", TORCH_BOX(&blipfast::dropout));
  m.impl("transpose_and_sum", TORCH_BOX(&blipfast::transpose_and_sum));
}
