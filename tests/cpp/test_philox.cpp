// philox.h against the known-answer vectors of Random123 (tests/kat_vectors, the lines "philox4x32 10").
#include "philox.h"

#include <ios>

#include "check.h"

namespace {

struct KnownAnswer {
  uint32_t counter[4], key[2], words[4];
};

constexpr KnownAnswer kKnownAnswers[] = {
    {{0x00000000, 0x00000000, 0x00000000, 0x00000000},
     {0x00000000, 0x00000000},
     {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

void known_answers() {
  for (const KnownAnswer& known : kKnownAnswers) {
    const uint32_t* c = known.counter;
    const randlora::Philox4 got = randlora::philox4x32_10(c[0], c[1], c[2], c[3], known.key[0], known.key[1]);
    for (int lane = 0; lane < 4; ++lane)
      CHECK_THAT(got.v[lane] == known.words[lane], "counter ", std::hex, c[0], " ..., lane ", lane, ": got ",
                 got.v[lane], ", expected ", known.words[lane]);
  }
}

}  // namespace

int main() {
  check::run("philox4x32-10 gives Random123's known answers", known_answers);
  return check::finish();
}
