#include "models/rope.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <tuple>
#include <utility>
#include <vector>

#include "models/safetensors.h"
#include "tests/testing/status_matchers.h"
#include "tests/unit/models/test_files.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

// transformers computes the table in fp32; a few roundings of 2^-24 and one of pow.
constexpr double kTolerance = 6e-7;

struct Expected {
  const char* name;
  RopeConfig rope;
  float attention_scale;
  std::vector<std::pair<size_t, double>> inv_freq;
};

RopeConfig Rope(double theta, RopeScaling scaling, double factor, int64_t original) {
  RopeConfig rope;
  rope.theta = theta;
  rope.rotary_dim = 64;
  rope.scaling = scaling;
  rope.factor = factor;
  rope.original_max_position_embeddings = original;
  return rope;
}

// Head dim 64. "transformers": printed by ROPE_INIT_FUNCTIONS of transformers 4.45.2 (for yarn with a
// max_position_embeddings equal to the original length, as that version looks at no other). "by hand":
// computed in fp64 by a Python script from the formulas of transformers 5.
TEST(RotaryTable, EqualsRecordedFrequencies) {
  RopeConfig betas = Rope(10000.0, RopeScaling::kYarn, 16.0, 2048);
  betas.beta_fast = 16.0;
  betas.beta_slow = 2.0;
  betas.attention_factor = 1.25;
  RopeConfig untruncated = Rope(150000.0, RopeScaling::kYarn, 32.0, 4096);
  untruncated.truncate = false;
  RopeConfig mscale = Rope(10000.0, RopeScaling::kYarn, 40.0, 4096);
  mscale.mscale = 1.0;
  mscale.mscale_all_dim = 0.707;
  const Expected cases[] = {
      {"transformers none",
       Rope(10000.0, RopeScaling::kNone, 1.0, 0),
       1.0f,
       {{0, 1},
        {1, 0.749894202},
        {8, 0.100000001},
        {12, 0.0316227786},
        {15, 0.0133352149},
        {31, 0.00013335215}}},
      {"transformers none, theta 1e7",
       Rope(1e7, RopeScaling::kNone, 1.0, 0),
       1.0f,
       {{0, 1},
        {1, 0.604296386},
        {8, 0.0177827943},
        {16, 0.000316227786},
        {24, 5.62341347e-06},
        {31, 1.65481708e-07}}},
      {"transformers linear",
       Rope(10000.0, RopeScaling::kLinear, 4.0, 0),
       1.0f,
       {{0, 0.25}, {1, 0.18747355}, {8, 0.0250000004}, {16, 0.00249999994}, {31, 3.33380376e-05}}},
      {"transformers llama3",
       Rope(500000.0, RopeScaling::kLlama3, 8.0, 8192),
       1.0f,
       {{0, 1},
        {1, 0.663601279},
        {12, 0.00729266508},
        {15, 0.00137189368},
        {16, 0.000524846022},
        {18, 7.78465546e-05},
        {20, 3.42810235e-05},
        {31, 3.7673226e-07}}},
      {"transformers yarn",
       Rope(1e6, RopeScaling::kYarn, 4.0, 32768),
       1.13862944f,
       {{0, 1},
        {8, 0.0316227786},
        {12, 0.00515479548},
        {15, 0.00102661771},
        {16, 0.000583333371},
        {18, 0.000175706868},
        {20, 4.44569851e-05},
        {24, 7.90569356e-06},
        {31, 3.84981632e-07}}},
      {"transformers yarn, betas and attention factor",
       betas,
       1.25f,
       {{0, 1},
        {8, 0.100000001},
        {12, 0.0242111888},
        {15, 0.00552161271},
        {16, 0.00296874996},
        {18, 0.000351463328},
        {20, 0.000197642366},
        {31, 8.3345094e-06}}},
      {"by hand yarn, not truncated",
       untruncated,
       1.34657359f,
       {{0, 1},
        {1, 0.689044306},
        {8, 0.0508132748},
        {12, 0.00679495949},
        {15, 0.0010526021},
        {16, 0.000456483919},
        {18, 3.83088124e-05},
        {20, 1.81883367e-05},
        {31, 3.02351143e-07}}},
      {"by hand yarn, mscale",
       mscale,
       1.0857264f,
       {{0, 1},
        {8, 0.1},
        {12, 0.0268793601},
        {15, 0.00833450895},
        {16, 0.0055},
        {18, 0.0022493653},
        {20, 0.000790569415},
        {24, 2.5e-05},
        {31, 3.33380358e-06}}},
  };
  for (const Expected& expected : cases) {
    SCOPED_TRACE(expected.name);
    LF_ASSERT_OK_AND_ASSIGN(const RotaryTable table, BuildRotaryTable(expected.rope, 1000));
    ASSERT_EQ(table.inv_freq.size(), 32u);
    EXPECT_NEAR(table.attention_scale, expected.attention_scale, 1e-6);
    for (const auto& [index, value] : expected.inv_freq) {
      EXPECT_NEAR(table.inv_freq[index], value, kTolerance * value) << "pair " << index;
    }
  }
}

std::vector<float> Floats(const SafetensorsFile& file, const char* name) {
  const SafetensorsTensor* tensor = file.Find(name);
  if (tensor == nullptr || tensor->dtype != DType::kFloat32) return {};
  std::vector<float> values(tensor->bytes.size() / sizeof(float));
  std::memcpy(values.data(), tensor->bytes.data(), tensor->bytes.size());
  return values;
}

TEST(RotaryTable, EqualsGoldenModels) {
  const std::vector<std::string> folders = GoldenModels();
  if (folders.empty()) GTEST_SKIP() << "tests/golden/data is absent";
  for (const std::string& folder : folders) {
    SCOPED_TRACE(folder);
    LF_ASSERT_OK_AND_ASSIGN(const ModelConfig config, LoadModelConfig(folder));
    LF_ASSERT_OK_AND_ASSIGN(const auto golden, SafetensorsFile::Open(folder + "/golden.safetensors"));
    const auto num_tokens = static_cast<int64_t>(std::filesystem::file_size(folder + "/tokens.i32") / 4);
    LF_ASSERT_OK_AND_ASSIGN(const RotaryTable table, BuildRotaryTable(config.rope, num_tokens));
    const std::vector<float> inv_freq = Floats(*golden, "rope.inv_freq");
    const std::vector<float> factor = Floats(*golden, "rope.attention_factor");
    ASSERT_EQ(inv_freq.size(), table.inv_freq.size());
    ASSERT_EQ(factor.size(), 1u);
    EXPECT_NEAR(table.attention_scale, factor[0], 1e-6);
    for (size_t i = 0; i < inv_freq.size(); ++i) {
      EXPECT_NEAR(table.inv_freq[i], inv_freq[i], kTolerance * inv_freq[i]) << "pair " << i;
    }
  }
}

TEST(RotaryTable, FrequenciesAreFp32Numbers) {
  LF_ASSERT_OK_AND_ASSIGN(const RotaryTable table,
                          BuildRotaryTable(Rope(1e7, RopeScaling::kNone, 1.0, 0), 1));
  for (const double frequency : table.inv_freq) {
    EXPECT_EQ(frequency, static_cast<double>(static_cast<float>(frequency)));
  }
}

// 0.1 ln(tokens / original) + 1
TEST(RotaryTable, DualChunksScalePromptsBeyondTheOriginalLength) {
  RopeConfig rope = Rope(1e7, RopeScaling::kNone, 1.0, 0);
  rope.dual_chunk = {262144, 8192};
  for (const auto& [original, num_tokens, scale] : {std::tuple(0, 1010000, 1.0),
                                                    {262144, 262144, 1.0},
                                                    {262144, 1, 1.0},
                                                    {262144, 524288, 1.0693147},
                                                    {262144, 1010000, 1.1348812}}) {
    rope.dual_chunk_original_tokens = original;
    LF_ASSERT_OK_AND_ASSIGN(const RotaryTable table, BuildRotaryTable(rope, num_tokens));
    EXPECT_NEAR(table.attention_scale, scale, 1e-6) << num_tokens << " of " << original;
  }
}

TEST(RotaryTable, LengthOfThePromptDoesNotMatterToTheseKinds) {
  for (const RopeScaling scaling :
       {RopeScaling::kNone, RopeScaling::kLinear, RopeScaling::kLlama3, RopeScaling::kYarn}) {
    const RopeConfig rope = Rope(10000.0, scaling, 8.0, 128);
    LF_ASSERT_OK_AND_ASSIGN(const RotaryTable empty, BuildRotaryTable(rope, 0));
    LF_ASSERT_OK_AND_ASSIGN(const RotaryTable longest, BuildRotaryTable(rope, 1 << 20));
    EXPECT_EQ(empty.inv_freq, longest.inv_freq) << RopeScalingName(scaling);
    EXPECT_EQ(empty.attention_scale, longest.attention_scale) << RopeScalingName(scaling);
  }
}

RopeConfig LongRope(double factor, int64_t original) {
  RopeConfig rope = Rope(10000.0, RopeScaling::kLongRope, factor, original);
  rope.rotary_dim = 4;
  rope.short_factor = {1.0, 2.0};
  rope.long_factor = {4.0, 50.0};
  return rope;
}

// The set changes with the first token beyond the original length, for all positions; the scale does not.
TEST(RotaryTable, LongRopeTakesItsFactorsByTheLengthOfThePrompt) {
  const RopeConfig rope = LongRope(32.0, 4096);
  const double expected_scale = std::sqrt(1.0 + std::log(32.0) / std::log(4096.0));  // 1.1902 of Phi-3-mini
  for (const int64_t num_tokens : {0, 1, 4096}) {
    LF_ASSERT_OK_AND_ASSIGN(const RotaryTable table, BuildRotaryTable(rope, num_tokens));
    EXPECT_NEAR(table.inv_freq[0], 1.0, 1e-7);
    EXPECT_NEAR(table.inv_freq[1], 0.01 / 2.0, 1e-9);
    EXPECT_NEAR(table.attention_scale, expected_scale, 1e-6);
  }
  for (const int64_t num_tokens : {4097, 1 << 20}) {
    LF_ASSERT_OK_AND_ASSIGN(const RotaryTable table, BuildRotaryTable(rope, num_tokens));
    EXPECT_NEAR(table.inv_freq[0], 0.25, 1e-7);
    EXPECT_NEAR(table.inv_freq[1], 0.01 / 50.0, 1e-9);
    EXPECT_NEAR(table.attention_scale, expected_scale, 1e-6);
  }
}

TEST(RotaryTable, LongRopeScalesByItsAttentionFactorOrNotBelowTheOriginalLength) {
  RopeConfig rope = LongRope(0.5, 4096);
  LF_ASSERT_OK_AND_ASSIGN(RotaryTable table, BuildRotaryTable(rope, 1));
  EXPECT_EQ(table.attention_scale, 1.0f);
  rope.attention_factor = 1.25;
  LF_ASSERT_OK_AND_ASSIGN(table, BuildRotaryTable(rope, 1));
  EXPECT_EQ(table.attention_scale, 1.25f);
}

TEST(RotaryTable, LongRopeRefusesFactorsThatDoNotFit) {
  const auto refused = [](const RopeConfig& rope, const char* in_message) {
    EXPECT_THAT(BuildRotaryTable(rope, 1),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(in_message)));
  };
  RopeConfig rope = LongRope(32.0, 4096);
  rope.long_factor = {1.0};
  refused(rope, "long_factor has 1 numbers, must have rotary_dim / 2 = 2");
  rope = LongRope(32.0, 4096);
  rope.short_factor[1] = 0.0;
  refused(rope, "short_factor 0 must be finite and above 0");
  rope = LongRope(32.0, 4096);
  rope.attention_factor = -1.0;
  refused(rope, "attention_factor -1");
  refused(LongRope(32.0, 1), "original_max_position_embeddings 1");
  refused(LongRope(-1.0, 64), "factor -1");
}

// A correction range that lies wholly outside the dimensions, and one of a single point, give finite
// frequencies.
TEST(RotaryTable, YarnSurvivesDegenerateRanges) {
  for (const int64_t original : {int64_t{1}, int64_t{7}, int64_t{1} << 28}) {
    RopeConfig rope = Rope(10000.0, RopeScaling::kYarn, 4.0, original);
    rope.beta_fast = rope.beta_slow = 1.0;
    for (const int64_t dim : {2, 64}) {
      rope.rotary_dim = dim;
      LF_ASSERT_OK_AND_ASSIGN(const RotaryTable table, BuildRotaryTable(rope, 1));
      for (const double frequency : table.inv_freq) {
        EXPECT_TRUE(std::isfinite(frequency) && frequency > 0) << "original " << original << " dim " << dim;
      }
    }
  }
}

TEST(RotaryTable, RefusesFieldsOutOfRange) {
  RopeConfig rope = Rope(10000.0, RopeScaling::kNone, 1.0, 0);
  EXPECT_THAT(BuildRotaryTable(rope, -1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("num_tokens -1")));
  rope.rotary_dim = 63;
  EXPECT_THAT(BuildRotaryTable(rope, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("rotary_dim 63")));
  rope.rotary_dim = 0;
  EXPECT_THAT(BuildRotaryTable(rope, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("rotary_dim 0")));
  rope = Rope(std::nan(""), RopeScaling::kNone, 1.0, 0);
  EXPECT_THAT(BuildRotaryTable(rope, 1),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("theta nan")));
}

}  // namespace
}  // namespace longfill
