#include <cmath>
#include <numbers>

#include "kernels/cpu/oracle/oracle.h"

namespace longfill::oracle {

std::vector<double> Embed(std::span<const int32_t> ids, const float* table, int64_t width) {
  std::vector<double> out;
  for (const int64_t id : ids) out.insert(out.end(), table + id * width, table + (id + 1) * width);
  return out;
}

std::vector<double> RmsNorm(const float* x, const float* weight, double epsilon, int64_t num_rows,
                            int64_t width) {
  std::vector<double> out(num_rows * width);
  for (int64_t row = 0; row < num_rows; ++row) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i)
      squares += static_cast<double>(x[row * width + i]) * x[row * width + i];
    const double rms = std::sqrt(squares / static_cast<double>(width) + epsilon);
    for (int64_t i = 0; i < width; ++i) out[row * width + i] = x[row * width + i] / rms * weight[i];
  }
  return out;
}

std::vector<double> Gemm(const float* x, const float* weight, const float* bias, int64_t num_rows,
                         int64_t in_width, int64_t out_width) {
  std::vector<double> out(num_rows * out_width);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t j = 0; j < out_width; ++j) {
      double sum = bias == nullptr ? 0 : bias[j];
      for (int64_t i = 0; i < in_width; ++i) {
        sum += static_cast<double>(x[row * in_width + i]) * static_cast<double>(weight[j * in_width + i]);
      }
      out[row * out_width + j] = sum;
    }
  }
  return out;
}

std::vector<double> GatedActivation(const float* a, const float* b, Gate gate, int64_t count) {
  std::vector<double> out(count);
  for (int64_t i = 0; i < count; ++i) {
    const double x = a[i];
    double activated = 0;
    if (gate == Gate::kSilu) {
      activated = x / (1 + std::exp(-x));
    } else {
      const double inner = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
      activated = x / 2 * (1 + std::tanh(inner));
    }
    out[i] = activated * b[i];
  }
  return out;
}

std::vector<double> Rotary(const RotaryInput& in) {
  const int64_t half = static_cast<int64_t>(in.inv_freq.size());
  const int64_t num_rows = static_cast<int64_t>(in.position.size());
  std::vector<double> out(in.num_heads * num_rows * in.head_dim);
  for (int64_t head = 0; head < in.num_heads; ++head) {
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* x = in.x + (row * in.num_heads + head) * in.head_dim;
      double* y = out.data() + (head * num_rows + row) * in.head_dim;
      for (int64_t i = 0; i < in.head_dim; ++i) y[i] = x[i];
      for (int64_t pair = 0; pair < half; ++pair) {
        const double angle = static_cast<float>(static_cast<double>(in.position[row]) * in.inv_freq[pair]);
        const double c = std::cos(angle) * in.attention_scale;
        const double s = std::sin(angle) * in.attention_scale;
        const bool split = in.pairs == RotaryPairs::kHalfSplit;
        const int64_t first = split ? pair : 2 * pair;
        const int64_t second = split ? pair + half : 2 * pair + 1;
        y[first] = x[first] * c - x[second] * s;
        y[second] = x[second] * c + x[first] * s;
      }
    }
  }
  return out;
}

}  // namespace longfill::oracle
