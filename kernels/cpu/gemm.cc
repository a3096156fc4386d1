#include "kernels/cpu/gemm.h"

#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/widen.h"
#include "kernels/cpu/workspace.h"

namespace longfill {
namespace {

constexpr int64_t kRowUnit = 24;      // a library call has a multiple of it
constexpr int64_t kRowsOfCall = 144;  // at most
constexpr int64_t kRowsOfFp32Task = 288;
constexpr int64_t kRowsOfTask = 1024;  // rows that share one widened block of the weight
constexpr int64_t kColumnBlock = 256;

int64_t PartBytes(int64_t in_width) {
  const int64_t floats = kColumnBlock * in_width + kRowUnit * in_width + kRowUnit * kColumnBlock;
  return floats * static_cast<int64_t>(sizeof(float));
}

// oneDNN parallelises by OpenMP, whose team size is a property of the calling thread.
class OneOmpThread {
 public:
  OneOmpThread() : before_(omp_get_max_threads()) {
    if (before_ != 1) omp_set_num_threads(1);
  }
  ~OneOmpThread() {
    if (before_ != 1) omp_set_num_threads(before_);
  }
  OneOmpThread(const OneOmpThread&) = delete;
  OneOmpThread& operator=(const OneOmpThread&) = delete;

 private:
  const int before_;
};

// Bounds of part `i` of `size` cut into `parts` pieces as equal as multiples of `unit` allow; the last takes
// the rest.
int64_t PartBegin(int64_t size, int64_t parts, int64_t unit, int64_t i) {
  return i == parts ? size : size / parts / unit * unit * i;
}

int64_t NumRowParts(int64_t num_rows, int64_t rows) { return std::max<int64_t>(1, num_rows / rows); }

absl::Status Check(const GemmParams& params, Workspace workspace, int num_threads) {
  LF_RETURN_IF_ERROR(CheckAtLeast("gemm", "in_width", params.in_width, 1));
  LF_RETURN_IF_ERROR(CheckAtLeast("gemm", "x_stride", params.x_stride, params.in_width));
  LF_RETURN_IF_ERROR(CheckAtLeast("gemm", "out_stride", params.out_stride, params.out_width));
  if (!IsFloat(params.weight_dtype)) {
    return absl::UnimplementedError(
        absl::StrCat("gemm: no variant for weights of ", std::string(DTypeName(params.weight_dtype))));
  }
  if (params.out_dtype != DType::kFloat32) {
    return absl::UnimplementedError(
        absl::StrCat("gemm: no variant for an output of ", std::string(DTypeName(params.out_dtype))));
  }
  return CheckWorkspace("gemm", workspace, CpuGemmWorkspaceBytes(params.in_width, num_threads));
}

// One block of columns for a stretch of rows, in the scratch of one worker.
class GemmTask {
 public:
  GemmTask(const GemmParams& params, char* scratch) : params_(params) {
    widened_ = reinterpret_cast<float*>(scratch);
    padded_x_ = widened_ + kColumnBlock * params.in_width;
    padded_out_ = padded_x_ + kRowUnit * params.in_width;
  }

  absl::Status Run(int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end) {
    const float* weight = Weight(column_begin, column_end);
    const int64_t num_columns = column_end - column_begin;
    int64_t row = row_begin;
    while (row_end - row >= kRowUnit) {
      const int64_t rows = std::min(kRowsOfCall, (row_end - row) / kRowUnit * kRowUnit);
      LF_RETURN_IF_ERROR(SingleThreadSgemm(Row(row), params_.x_stride, weight, rows, num_columns,
                                           params_.in_width, params_.accumulate, Out(row, column_begin),
                                           params_.out_stride));
      row += rows;
    }
    if (row < row_end) {
      LF_RETURN_IF_ERROR(RunPadded(weight, row, row_end - row, column_begin, num_columns));
    }
    if (params_.bias != nullptr) AddBias(row_begin, row_end, column_begin, num_columns);
    return absl::OkStatus();
  }

 private:
  const float* Row(int64_t row) const {
    return static_cast<const float*>(params_.x) + row * params_.x_stride;
  }
  float* Out(int64_t row, int64_t column) const {
    return static_cast<float*>(params_.out) + row * params_.out_stride + column;
  }

  const float* Weight(int64_t column_begin, int64_t column_end) {
    const int64_t offset = column_begin * params_.in_width;
    if (params_.weight_dtype == DType::kFloat32) return static_cast<const float*>(params_.weight) + offset;
    Widen(static_cast<const uint16_t*>(params_.weight) + offset, params_.weight_dtype,
          (column_end - column_begin) * params_.in_width, widened_);
    return widened_;
  }

  absl::Status RunPadded(const float* weight, int64_t row_begin, int64_t num_rows, int64_t column_begin,
                         int64_t num_columns) {
    const int64_t in_width = params_.in_width;
    std::memset(padded_x_, 0, static_cast<size_t>(kRowUnit * in_width) * sizeof(float));
    std::memset(padded_out_, 0, static_cast<size_t>(kRowUnit * num_columns) * sizeof(float));
    for (int64_t row = 0; row < num_rows; ++row) {
      std::memcpy(padded_x_ + row * in_width, Row(row_begin + row),
                  static_cast<size_t>(in_width) * sizeof(float));
      if (params_.accumulate) {
        std::memcpy(padded_out_ + row * num_columns, Out(row_begin + row, column_begin),
                    static_cast<size_t>(num_columns) * sizeof(float));
      }
    }
    LF_RETURN_IF_ERROR(SingleThreadSgemm(padded_x_, in_width, weight, kRowUnit, num_columns, in_width,
                                         params_.accumulate, padded_out_, num_columns));
    for (int64_t row = 0; row < num_rows; ++row) {
      std::memcpy(Out(row_begin + row, column_begin), padded_out_ + row * num_columns,
                  static_cast<size_t>(num_columns) * sizeof(float));
    }
    return absl::OkStatus();
  }

  void AddBias(int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t num_columns) {
    const float* bias = static_cast<const float*>(params_.bias) + column_begin;
    for (int64_t row = row_begin; row < row_end; ++row) {
      float* out = Out(row, column_begin);
      for (int64_t i = 0; i < num_columns; ++i) out[i] += bias[i];
    }
  }

  const GemmParams& params_;
  float* widened_;     // [kColumnBlock, in_width]
  float* padded_x_;    // [kRowUnit, in_width]
  float* padded_out_;  // [kRowUnit, kColumnBlock]
};

}  // namespace

int64_t CpuGemmWorkspaceBytes(int64_t max_in_width, int num_threads) {
  return PartsBytes(num_threads, PartBytes(max_in_width));
}

absl::Status SingleThreadSgemm(const float* x, int64_t x_stride, const float* weight, int64_t num_rows,
                               int64_t out_width, int64_t in_width, bool accumulate, float* out,
                               int64_t out_stride) {
  const OneOmpThread one_thread;
  const dnnl_status_t status = dnnl_sgemm('N', 'T', num_rows, out_width, in_width, 1.0F, x, x_stride, weight,
                                          in_width, accumulate ? 1.0F : 0.0F, out, out_stride);
  if (status == dnnl_success) return absl::OkStatus();
  if (status == dnnl_out_of_memory) return absl::ResourceExhaustedError("gemm: oneDNN is out of memory");
  return absl::InternalError(absl::StrCat("gemm: dnnl_sgemm gave status ", static_cast<int>(status)));
}

absl::Status CpuGemm(const GemmParams& params, Workspace workspace, ThreadPool& pool) {
  LF_RETURN_IF_ERROR(CheckAtLeast("gemm", "num_rows", params.num_rows, 0));
  LF_RETURN_IF_ERROR(CheckAtLeast("gemm", "out_width", params.out_width, 0));
  if (params.num_rows == 0 || params.out_width == 0) return absl::OkStatus();
  LF_RETURN_IF_ERROR(Check(params, workspace, pool.num_threads()));
  // fp32 weights need no widening that rows would share, so smaller tasks balance better.
  const int64_t rows = params.weight_dtype == DType::kFloat32 ? kRowsOfFp32Task : kRowsOfTask;
  const int64_t row_parts = NumRowParts(params.num_rows, rows);
  const int64_t column_parts = (params.out_width + kColumnBlock - 1) / kColumnBlock;
  std::atomic<int> failed{0};
  absl::Status first_error;
  pool.ParallelFor(row_parts * column_parts, [&](int64_t number, int worker) {
    const int64_t row_part = number % row_parts;
    const int64_t column_begin = number / row_parts * kColumnBlock;
    GemmTask task(params, PartOf(workspace, worker, PartBytes(params.in_width)));
    absl::Status status = task.Run(PartBegin(params.num_rows, row_parts, kRowUnit, row_part),
                                   PartBegin(params.num_rows, row_parts, kRowUnit, row_part + 1),
                                   column_begin, std::min(params.out_width, column_begin + kColumnBlock));
    if (!status.ok() && failed.fetch_add(1) == 0) first_error = std::move(status);
  });
  return first_error;
}

}  // namespace longfill
