#include "kernels/cpu/elementwise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/elementwise_simd.h"
#include "kernels/cpu/tile_constants.h"
#include "kernels/cpu/widen.h"
#include "kernels/cpu/workspace.h"

namespace longfill {
namespace {

// body(row) for all rows, some kilobytes of them to a task.
template <typename Body>
void ForRows(ThreadPool& pool, int64_t num_rows, int64_t floats_per_row, const Body& body) {
  const int64_t rows_per_task =
      std::max<int64_t>(1, (int64_t{1} << 14) / std::max<int64_t>(1, floats_per_row));
  pool.ParallelFor((num_rows + rows_per_task - 1) / rows_per_task, [&](int64_t task, int) {
    const int64_t end = std::min(num_rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) body(row);
  });
}

absl::Status CheckRotary(const RotaryParams& params) {
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "num_heads", params.num_heads, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "row_offset", params.row_offset, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "head_dim", params.head_dim, 1));
  if (params.head_dim > kMaxHeadDim) {
    return absl::UnimplementedError(
        absl::StrCat("rotary: no variant for head_dim ", params.head_dim, " above ", kMaxHeadDim));
  }
  if (params.rotary_dim < 0 || params.rotary_dim > params.head_dim || params.rotary_dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rotary: rotary_dim ", params.rotary_dim, " is not an even number up to head_dim ", params.head_dim));
  }
  if (static_cast<int64_t>(params.inv_freq.size()) != params.rotary_dim / 2) {
    return absl::InvalidArgumentError(absl::StrCat("rotary: inv_freq has ", params.inv_freq.size(),
                                                   " entries for rotary_dim ", params.rotary_dim));
  }
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "x_stride", params.x_stride, params.num_heads * params.head_dim));
  LF_RETURN_IF_ERROR(CheckAtLeast("rotary", "head_stride", params.head_stride,
                                  (params.row_offset + params.num_rows) * params.head_dim));
  if (params.positions.block < 1 || params.positions.stride < 0) {
    return absl::InvalidArgumentError(absl::StrCat("rotary: position map ", ToString(params.positions)));
  }
  return absl::OkStatus();
}

// One head of one row; x and out do not overlap. Plain products and sums, so bits depend on nothing but the
// inputs.
void RotateRow(const float* x, const float* cosine, const float* sine, const RotaryParams& params,
               float* out) {
  const int64_t pairs = params.rotary_dim / 2;
  if (params.form == RotaryForm::kHalfSplit) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = x[i];
      const float b = x[i + pairs];
      out[i] = a * cosine[i] - b * sine[i];
      out[i + pairs] = b * cosine[i] + a * sine[i];
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = x[2 * i];
      const float b = x[2 * i + 1];
      out[2 * i] = a * cosine[i] - b * sine[i];
      out[2 * i + 1] = b * cosine[i] + a * sine[i];
    }
  }
  std::memcpy(out + params.rotary_dim, x + params.rotary_dim,
              static_cast<size_t>(params.head_dim - params.rotary_dim) * sizeof(float));
}

}  // namespace

absl::Status CpuEmbed(const EmbedParams& params, ThreadPool& pool) {
  if (!IsFloat(params.table_dtype)) {
    return absl::UnimplementedError(
        absl::StrCat("embed: no variant for a table of ", std::string(DTypeName(params.table_dtype))));
  }
  LF_RETURN_IF_ERROR(CheckAtLeast("embed", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("embed", "width", params.width, 0));
  for (int64_t i = 0; i < params.num_rows; ++i) {
    if (params.ids[i] < 0 || params.ids[i] >= params.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("embed: id ", params.ids[i], " at ", i,
                                                     " is outside of the vocabulary of ", params.vocab_size));
    }
  }
  ForRows(pool, params.num_rows, params.width, [&](int64_t row) {
    const int64_t offset = int64_t{params.ids[row]} * params.width;
    float* out = static_cast<float*>(params.out) + row * params.width;
    if (params.table_dtype == DType::kFloat32) {
      std::memcpy(out, static_cast<const float*>(params.table) + offset,
                  static_cast<size_t>(params.width) * sizeof(float));
    } else {
      Widen(static_cast<const uint16_t*>(params.table) + offset, params.table_dtype, params.width, out);
    }
  });
  return absl::OkStatus();
}

absl::Status CpuRmsNorm(const RmsNormParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("rms norm", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("rms norm", "width", params.width, 1));
  const float* x = static_cast<const float*>(params.x);
  float* out = static_cast<float*>(params.out);
  ForRows(pool, params.num_rows, params.width, [&](int64_t row) {
    RmsNormRow(x + row * params.width, params.weight, params.epsilon, params.width, out + row * params.width);
  });
  return absl::OkStatus();
}

absl::Status CpuGatedActivation(const GatedActivationParams& params, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("gated activation", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("gated activation", "width", params.width, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("gated activation", "in_stride", params.in_stride, params.width));
  if (params.activation != Activation::kSilu && params.activation != Activation::kGeluTanh) {
    return absl::UnimplementedError(
        absl::StrCat("gated activation: no variant ", static_cast<int>(params.activation)));
  }
  const float* gate = static_cast<const float*>(params.gate);
  const float* up = static_cast<const float*>(params.up);
  float* out = static_cast<float*>(params.out);
  ForRows(pool, params.num_rows, params.width, [&](int64_t row) {
    GatedActivationRow(gate + row * params.in_stride, up + row * params.in_stride, params.activation,
                       params.width, out + row * params.width);
  });
  return absl::OkStatus();
}

absl::Status CpuRotary(const RotaryParams& params, ThreadPool& pool) {
  if (params.num_rows == 0 || params.num_heads == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(CheckRotary(params));
  const float* x = static_cast<const float*>(params.x);
  float* out = static_cast<float*>(params.out);
  ForRows(pool, params.num_rows, params.num_heads * params.head_dim, [&](int64_t row) {
    float cosine[kMaxHeadDim / 2];
    float sine[kMaxHeadDim / 2];
    const double position = static_cast<double>(params.positions.Position(params.row_offset + row));
    for (int64_t i = 0; i < params.rotary_dim / 2; ++i) {
      const double angle = static_cast<float>(position * params.inv_freq[static_cast<size_t>(i)]);
      cosine[i] = static_cast<float>(params.attention_scale * std::cos(angle));
      sine[i] = static_cast<float>(params.attention_scale * std::sin(angle));
    }
    for (int64_t head = 0; head < params.num_heads; ++head) {
      RotateRow(x + row * params.x_stride + head * params.head_dim, cosine, sine, params,
                out + head * params.head_stride + (params.row_offset + row) * params.head_dim);
    }
  });
  return absl::OkStatus();
}

}  // namespace longfill
