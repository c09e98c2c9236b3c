// Atomic operations and fences.
#include <algorithm>
#include "memory.h"
#include "numbers.h"
#include "races.h"
#include "table.h"
#include "weak.h"

namespace machine {

template <class T> static u64 add_floats(u64 a, u64 b) {
  return bits_as<u32>(widen(bits_as<T>((u32)a)) + widen(bits_as<T>((u32)b)));
}
template <class T> static u16 add_16(u16 a, u16 b) { return narrow<T>(widen(T{a}) + widen(T{b})).bits; }
template <class T> static u64 add_pairs(u64 a, u64 b) {
  return add_16<T>((u16)a, (u16)b) | (u32)add_16<T>((u16)(a >> 16), (u16)(b >> 16)) << 16;
}

static u64 sum(Type type, u64 a, u64 b) {
  switch (type) {
    case Type::f32: return add_floats<float>(a, b);
    case Type::f64: return bits_as<u64>(bits_as<double>(a) + bits_as<double>(b));
    case Type::f16: return add_16<Half>((u16)a, (u16)b);
    case Type::bf16: return add_16<Bfloat>((u16)a, (u16)b);
    case Type::f16x2: return add_pairs<Half>(a, b);
    case Type::bf16x2: return add_pairs<Bfloat>(a, b);
    default: return a + b;
  }
}

// Values come with zeroes above their width.
static bool less(Type type, u64 a, u64 b) {
  if (type == Type::s32) return (s32)a < (s32)b;
  if (type == Type::s64) return (s64)a < (s64)b;
  return a < b;
}

static u64 updated(const Instruction& in, u64 old, u64 b, u64 c) {
  switch ((Atomic)in.variant) {
    case Atomic::add: return sum(in.type, old, b);
    case Atomic::min: return less(in.type, b, old) ? b : old;
    case Atomic::max: return less(in.type, old, b) ? b : old;
    case Atomic::bit_and: return old & b;
    case Atomic::bit_or: return old | b;
    case Atomic::bit_xor: return old ^ b;
    case Atomic::exchange: return b;
    case Atomic::compare_and_swap: return old == b ? c : old;
    case Atomic::increment: return old >= b ? 0 : old + 1;
    case Atomic::decrement: return old == 0 || old > b ? b : old - 1;
  }
  return old;
}

// One lane's operation on memory; returns the old value.
static u64 update(Warp& warp, const Instruction& in, int lane, void* at) {
  u32 bytes = in.element_bytes;
  u64 b = value_of(warp, in.operands[1], lane, in.register_bytes, bytes), c = 0, old = 0;
  if ((Atomic)in.variant == Atomic::compare_and_swap)
    c = value_of(warp, in.operands[2], lane, in.register_bytes, bytes);
  memcpy(&old, at, bytes);
  u64 now = updated(in, old, b, c);
  if (memcmp(at, &now, bytes)) warp.launch->last_change = warp.launch->moment;
  memcpy(at, &now, bytes);
  return old;
}

static bool swaps(const Warp& warp, const Instruction& in, int lane, u64 address) {
  if ((Atomic)in.variant != Atomic::compare_and_swap) return true;
  u64 expected = value_of(warp, in.operands[1], lane, in.register_bytes, in.element_bytes);
  return !memcmp((const void*)address, &expected, in.element_bytes);
}

void atomic_global(Warp& warp, const Instruction& in, u32 lanes) {
  Launch& launch = *warp.launch;
  alignas(32) u64 at[LANES];
  addresses(warp, in, at);
  u32 bytes = in.element_bytes;
  if (!check_global(warp, in, lanes, at, bytes, true)) return;
  count_sectors(warp, lanes, at, bytes, ATOMICS);
  launch.count(Counter::atomic_threads, __builtin_popcount(lanes));
  if (launch.weak && (in.order & RELEASE)) release_stores(warp, lanes);
  u32 first = launch.random.below(LANES);  // lanes take place in a random rotation
  for (u32 k = 0; k < LANES; k++) {
    int i = (k + first) & 31;
    if (!on(lanes, i)) continue;
    if (launch.weak) meet_memory(warp, at[i], bytes);
    if (launch.races) launch.races->global_atomic(warp, in, i, at[i], bytes, swaps(warp, in, i, at[i]));
    u64 old = update(warp, in, i, (void*)at[i]);
    if (in.operands[0] != ABSENT) memcpy(lane_of(warp, in.operands[0], i, in.register_bytes), &old, in.register_bytes);
  }
  if (launch.weak && (in.order & ACQUIRE)) forget_lines(warp);
}

void atomic_shared(Warp& warp, const Instruction& in, u32 lanes) {
  alignas(32) u64 at[LANES];
  addresses(warp, in, at);
  u32 bytes = in.element_bytes;
  if (!check_shared(warp, in, lanes, at, bytes)) return;
  for (int i : each(lanes)) {
    if (warp.launch->races) warp.launch->races->shared_atomic(warp, in, i, at[i], bytes);
    if (warp.launch->request.uninitialised) memset(&warp.program->initialised[at[i]], 1, bytes);
    u64 old = update(warp, in, i, warp.program->shared + at[i]);
    if (in.operands[0] != ABSENT) memcpy(lane_of(warp, in.operands[0], i, in.register_bytes), &old, in.register_bytes);
  }
}

void fence(Warp& warp, const Instruction& in, u32 lanes) {
  if (in.scope == Scope::block) return;  // warps of a program share their memory anyway
  Launch& launch = *warp.launch;
  if (launch.weak) {
    release_stores(warp, lanes);
    forget_lines(warp);
  }
  if (launch.races) launch.races->fence(warp);
}

void proxy_fence(Warp& warp, const Instruction&, u32) { warp.proxy_fence = (u32)warp.launch->moment; }

}  // namespace machine
