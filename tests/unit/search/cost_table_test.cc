#include "models/search/cost_table.h"

#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_replace.h"
#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::HasSubstr;

const HeadPattern kFamily = VerticalSlash{1000, 6096};
const CostTableDevice kDevice = {"a card", DType::kBFloat16, 32, 8, 128, Coverage::kTiles};

CostTable NewTable() {
  CostTable table(kDevice);
  table.Add({kFamily, 1000, {{1, 400, 4, 1}, {0.5, 200, 2, 1}, {0.25, 100, 1, 0.5}}});
  table.Add({kFamily, 4000, {{0.25, 400, 4, 1}, {0.5, 1600, 16, 2}, {1, 6400, 64, 2}}});
  table.Add({BlockShare{4, 0.1}, 1000, {{1, 100, 0.5, 0.25}}});
  return table;
}

TEST(CostTable, ReadsBackWhatItWrites) {
  const CostTable table = NewTable();
  LF_ASSERT_OK_AND_ASSIGN(const CostTable read, ParseCostTable(table.ToJson(), "costs.json"));
  EXPECT_EQ(read.device(), kDevice);
  EXPECT_EQ(read.curves(), table.curves());
  EXPECT_EQ(read.ToJson(), table.ToJson());
}

TEST(CostTable, PointsAscendAndNoiseIsRaised) {
  CostTable table(kDevice);
  table.Add({kFamily, 1000, {{1, 400, 3, 1}, {0.5, 200, 5, 2}, {0.5, 7, 7, 7}}});
  const std::vector<CostPoint> want = {{0.5, 200, 5, 2}, {1, 400, 5, 2}};
  EXPECT_EQ(table.curves()[0].points, want);
}

TEST(CostTable, PredictsOnLinesBetweenThePoints) {
  LF_ASSERT_OK_AND_ASSIGN(const CostCurve curve, NewTable().CurveAt(kFamily, 1000));
  EXPECT_DOUBLE_EQ(PredictSeconds(curve, 0), 1.5);  // fixed costs
  EXPECT_DOUBLE_EQ(PredictSeconds(curve, 100), 1.5);
  EXPECT_DOUBLE_EQ(PredictSeconds(curve, 150), 2.25);
  EXPECT_DOUBLE_EQ(PredictSeconds(curve, 300), 4);
  EXPECT_DOUBLE_EQ(PredictSeconds(curve, 400), 5);
  EXPECT_DOUBLE_EQ(PredictSeconds(curve, 800), 9);  // attention in proportion, the index once
}

TEST(CostTable, ScaleForSecondsInvertsTheCurve) {
  LF_ASSERT_OK_AND_ASSIGN(const CostCurve curve, NewTable().CurveAt(kFamily, 1000));
  EXPECT_EQ(ScaleForSeconds(curve, 1.4), 0);
  EXPECT_DOUBLE_EQ(ScaleForSeconds(curve, 1.5), 0.25);
  EXPECT_DOUBLE_EQ(ScaleForSeconds(curve, 3), 0.5);
  EXPECT_DOUBLE_EQ(ScaleForSeconds(curve, 100), 1);
  const double between = ScaleForSeconds(curve, 4);
  EXPECT_GT(between, 0.5);
  EXPECT_LT(between, 1);
}

// Seconds that grow with the square of the length are a line in logarithms.
TEST(CostTable, LengthsBetweenAreInterpolatedAndOthersRefused) {
  LF_ASSERT_OK_AND_ASSIGN(const CostCurve curve, NewTable().CurveAt(kFamily, 2000));
  ASSERT_EQ(curve.points.size(), 3U);
  EXPECT_NEAR(curve.points[2].pairs, 1600, 1e-9);
  EXPECT_NEAR(curve.points[2].attention_seconds, 16, 1e-9);
  for (const int64_t beyond : {999, 4001}) {
    EXPECT_THAT(NewTable().CurveAt(kFamily, beyond).status(),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("1000, 4000")));
  }
  EXPECT_THAT(NewTable().CurveAt(BlockSparse{7}, 1000).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("block-sparse:7")));
}

TEST(CostTable, IsForOneDeviceTypeAndGeometry) {
  LF_EXPECT_OK(NewTable().CheckIsFor(kDevice));
  const auto expect = [](CostTableDevice device, const char* what) {
    EXPECT_THAT(NewTable().CheckIsFor(device), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(what)));
  };
  CostTableDevice other = kDevice;
  other.device = "another card";
  expect(other, "another card");
  other = kDevice;
  other.compute_dtype = DType::kFloat16;
  expect(other, "float16");
  other = kDevice;
  other.num_q_heads = 31;
  expect(other, "num_q_heads 32, here it is 31");
  other = kDevice;
  other.num_kv_heads = 4;
  expect(other, "num_kv_heads");
  other = kDevice;
  other.head_dim = 64;
  expect(other, "head_dim");
  other = kDevice;
  other.coverage = Coverage::kParity;
  expect(other, "parity");
}

TEST(CostTable, WhatIsNoTableIsRefusedByName) {
  const std::string good = NewTable().ToJson();
  const auto refused = [](const std::string& text, absl::StatusCode code, const char* what) {
    const absl::Status status = ParseCostTable(text, "costs.json").status();
    EXPECT_THAT(status, StatusIs(code, HasSubstr(what))) << text.substr(0, 200);
    EXPECT_THAT(std::string(status.message()), HasSubstr("costs.json"));
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  refused("", kInvalid, "");
  refused("[1, 2]", kInvalid, "no object");
  refused("{}", kInvalid, "longfill_cost_table");
  refused(good.substr(0, good.size() / 2), kInvalid, "");
  const auto changed = [&good](const char* from, const char* to) {
    const std::string text = absl::StrReplaceAll(good, {{from, to}});
    EXPECT_NE(text, good) << from;
    return text;
  };
  refused(changed("\"version\": 1", "\"version\": 2"), absl::StatusCode::kUnimplemented, "version 2");
  refused(changed("\"device\"", "\"devise\""), kInvalid, "device");
  refused(changed("bfloat16", "int3"), kInvalid, "int3");
  refused(changed("\"head_dim\": 128", "\"head_dim\": 0"), kInvalid, "head_dim");
  refused(changed("block-share:4,0.1", "block-share:4"), kInvalid, "block-share:4");
  refused(changed("\"scale\": 0.25", "\"scale\": 0.0"), kInvalid, "scale");
  refused(changed("\"pairs\": 6400.0", "\"pairs\": -1.0"), kInvalid, "pairs");
  refused(changed("\"pairs\": 6400.0", "\"pairs\": \"many\""), kInvalid, "pairs");
}

}  // namespace
}  // namespace longfill
