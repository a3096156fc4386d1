#include "deploy/cli/token_file.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "tests/testing/status_matchers.h"

namespace longfill {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(BinaryTokens, AreLittleEndianInt32) {
  const std::string bytes("\x01\x00\x00\x00\xff\xff\xff\x7f", 8);
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids, ParseBinaryTokens(bytes, "a.i32"));
  EXPECT_THAT(ids, ElementsAre(1, 2147483647));
}

TEST(BinaryTokens, RefuseALengthThatIsNoMultipleOfFour) {
  for (const size_t length : {1, 2, 3, 5, 10}) {
    EXPECT_THAT(ParseBinaryTokens(std::string(length, '\0'), "a.i32"),
                StatusIs(absl::StatusCode::kInvalidArgument,
                         AllOf(HasSubstr("a.i32"), HasSubstr(std::to_string(length) + " bytes"))));
  }
}

TEST(BinaryTokens, NameTheNegativeIdAndItsIndex) {
  const std::string bytes("\x01\x00\x00\x00\xfe\xff\xff\xff", 8);
  EXPECT_THAT(ParseBinaryTokens(bytes, "a.i32"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("-2"), HasSubstr("index 1"))));
}

TEST(BinaryTokens, RefuseAnEmptyPrompt) {
  EXPECT_THAT(ParseBinaryTokens("", "a.i32"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no token ids")));
}

TEST(JsonTokens, AreAListOfIntegers) {
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<int32_t> ids, ParseJsonTokens(" [0, 7,\n2147483647] ", "a.json"));
  EXPECT_THAT(ids, ElementsAre(0, 7, 2147483647));
}

TEST(JsonTokens, NameWhatIsNoInteger) {
  for (const char* element : {"1.5", "\"x\"", "null", "[1]", "true", "1e3"}) {
    EXPECT_THAT(ParseJsonTokens(std::string("[5, ") + element + "]", "a.json"),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("element 1 is")))
        << element;
  }
}

TEST(JsonTokens, NameNegativeAndHugeIds) {
  EXPECT_THAT(ParseJsonTokens("[5, 6, -7]", "a.json"),
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("-7"), HasSubstr("index 2"))));
  for (const char* huge : {"2147483648", "9223372036854775808", "18446744073709551615"}) {
    EXPECT_THAT(ParseJsonTokens(std::string("[") + huge + "]", "a.json"),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(huge), HasSubstr("int32"))));
  }
}

TEST(JsonTokens, RefuseWhatIsNestedSoDeepThatItWouldNotFitTheStack) {
  for (const char open : {'[', '{'}) {
    std::string text;
    for (int i = 0; i < 1000000; ++i) text += open == '[' ? "[" : "{\"a\":";
    EXPECT_THAT(ParseJsonTokens(text, "a.json"),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("a.json"), HasSubstr("deep"))));
  }
}

TEST(JsonTokens, RefuseOtherDocuments) {
  for (const char* text : {"", "[1, 2", "{\"ids\": [1]}", "7", "\x01\x02", "[1] [2]"}) {
    EXPECT_THAT(ParseJsonTokens(text, "a.json"),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("a.json")))
        << text;
  }
  EXPECT_THAT(ParseJsonTokens("[]", "a.json"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no token ids")));
}

TEST(TokenFile, IsNamedWhenItIsNotThereOrADirectory) {
  EXPECT_THAT(ReadTokenFile("/no/such/file.i32"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("/no/such/file.i32")));
  EXPECT_THAT(ReadTokenFile("/"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("directory")));
}

TEST(LogitsPositions, KeepTheOrderAsked) {
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<int64_t> positions, ParseLogitsPositions("4095,4094,0"));
  EXPECT_THAT(positions, ElementsAre(4095, 4094, 0));
  LF_ASSERT_OK_AND_ASSIGN(const std::vector<int64_t> last, ParseLogitsPositions("last"));
  EXPECT_THAT(last, IsEmpty());
}

TEST(LogitsPositions, RefuseWhatIsNoPosition) {
  for (const char* text : {"", "-1", "1,,2", "first", "1.5", "1,", "99999999999999999999"}) {
    EXPECT_THAT(ParseLogitsPositions(text),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--logits")))
        << text;
  }
}

}  // namespace
}  // namespace longfill
