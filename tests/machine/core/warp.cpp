// What the lanes of a warp do together: shuffles, votes, match, redux, bar.warp.sync. The scheduler has waited for the
// members.
#include <algorithm>
#include "registers.h"
#include "table.h"

namespace machine {

// The lane that lane i reads from; false: out of its segment, it keeps its own value.
static bool shuffle_source(Shuffle kind, int i, u32 b, u32 c, int& from) {
  u32 segment = c >> 8 & 31, clamp = c & 31, distance = b & 31;
  int limit = (int)((i & segment) | (clamp & ~segment));  // the last lane of the segment; of `up`, the first
  switch (kind) {
    case Shuffle::up: from = i - (int)distance; return from >= limit;
    case Shuffle::down: from = i + (int)distance; return from <= limit;
    case Shuffle::butterfly: from = i ^ (int)distance; return from <= limit;
    default: from = (int)((i & segment) | (distance & ~segment)); return from <= limit;
  }
}

// d[|p], a, b, c
void shuffle(Warp& warp, const Instruction& in, u32 lanes) {
  auto *values = source<u32>(warp, in.operands[1]), *b = source<u32>(warp, in.operands[2]),
       *c = source<u32>(warp, in.operands[3]);
  u32 results[LANES], valid = 0;
  for (int i = 0; i < LANES; i++) {
    int from;
    bool inside = shuffle_source((Shuffle)in.variant, i, b[i], c[i], from);
    if (!inside) from = i;
    valid |= (u32)inside << i;
    if (inside && on(lanes, i) && !on(lanes, from)) {
      warp.launch->report("inactive_lane", warp, in,
                          text("lane %d reads from lane %d, which does not take part", i, from));
    }
    results[i] = values[from];
  }
  write(destination<u32>(warp, in.operands[0]), results, lanes);
  if (in.operands[4] != ABSENT) write_predicate(warp, in.operands[4], valid, lanes);
}

// shfl.bfly of all lanes by a fixed distance, in one segment.
void butterfly(Warp& warp, const Instruction& in, u32 lanes) {
  if (lanes != ALL_LANES) return shuffle(warp, in, lanes);
  const u32* values = source<u32>(warp, in.operands[1]);
  u32 results[LANES];
  for (int i = 0; i < LANES; i++) results[i] = values[i ^ in.immediate];
  write(destination<u32>(warp, in.operands[0]), results, lanes);
}

void vote(Warp& warp, const Instruction& in, u32 lanes) {
  u32 bits = *source<u32>(warp, in.operands[1]);
  if (in.has(NEGATED)) bits = ~bits;
  bits &= lanes;
  if ((Vote)in.variant == Vote::ballot) {
    u32* to = destination<u32>(warp, in.operands[0]);
    for (int i : each(lanes)) to[i] = bits;
    return;
  }
  bool all = bits == lanes, any = bits != 0;
  bool result = (Vote)in.variant == Vote::all ? all : (Vote)in.variant == Vote::any ? any : all || !any;
  write_predicate(warp, in.operands[0], result ? ALL_LANES : 0, lanes);
}

void active_mask(Warp& warp, const Instruction& in, u32 lanes) {
  u32* to = destination<u32>(warp, in.operands[0]);
  for (int i : each(lanes)) to[i] = lanes;
}

// match.any: the lanes with the same value; match.all: all, if all have it.
void match(Warp& warp, const Instruction& in, u32 lanes) {
  u64 values[LANES];
  u32 results[LANES], equal = 0;
  for (int i : each(lanes)) values[i] = value_of(warp, in.operands[1], i, in.register_bytes, in.register_bytes);
  for (int i : each(lanes)) {
    u32 same = 0;
    for (int j : each(lanes)) same |= (u32)(values[i] == values[j]) << j;
    if (same == lanes) equal |= 1u << i;
    results[i] = in.has(ALL) && same != lanes ? 0 : same;
  }
  u32* to = destination<u32>(warp, in.operands[0]);
  for (int i : each(lanes)) to[i] = results[i];
  if (in.operands[2] != ABSENT) write_predicate(warp, in.operands[2], equal, lanes);
}

static u32 combine(const Instruction& in, u32 a, u32 b) {
  bool with_sign = in.type == Type::s32;
  switch ((Atomic)in.variant) {
    case Atomic::add: return a + b;
    case Atomic::min: return with_sign ? (u32)std::min((s32)a, (s32)b) : std::min(a, b);
    case Atomic::max: return with_sign ? (u32)std::max((s32)a, (s32)b) : std::max(a, b);
    case Atomic::bit_and: return a & b;
    case Atomic::bit_or: return a | b;
    default: return a ^ b;
  }
}

void reduce(Warp& warp, const Instruction& in, u32 lanes) {
  const u32* values = source<u32>(warp, in.operands[1]);
  u32 first = __builtin_ctz(lanes), result = values[first];
  for (int i : each(lanes & (lanes - 1))) result = combine(in, result, values[i]);
  u32* to = destination<u32>(warp, in.operands[0]);
  for (int i : each(lanes)) to[i] = result;
}

void warp_barrier(Warp& warp, const Instruction&, u32) { warp.warp_barriers++; }

}  // namespace machine
