#ifndef LONGFILL_KERNELS_BASE_DTYPE_H_
#define LONGFILL_KERNELS_BASE_DTYPE_H_

#include <cstdint>
#include <string_view>

#include "kernels/base/status.h"

namespace longfill {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kInt32, kInt64 };

int64_t DTypeBytes(DType dtype);
std::string_view DTypeName(DType dtype);  // "float32", "bfloat16", "float16", "int32", "int64"
absl::StatusOr<DType> ParseDType(std::string_view name);
bool IsFloat(DType dtype);

// Scalar conversions; narrowing rounds to nearest even, overflow goes to infinity, NaN stays NaN.
float BFloat16ToFloat(uint16_t bits);
float Float16ToFloat(uint16_t bits);
uint16_t FloatToBFloat16(float value);
uint16_t FloatToFloat16(float value);

// Array conversions between fp32 and a float storage type. Source and destination do not overlap.
void WidenToFloat(const void* source, DType source_dtype, int64_t count, float* destination);
void NarrowFromFloat(const float* source, int64_t count, DType destination_dtype, void* destination);

}  // namespace longfill

#endif  // LONGFILL_KERNELS_BASE_DTYPE_H_
