// Access to the registers of a warp's lanes.
#pragma once
#include "machine.h"

namespace machine {

template <class T> inline T* destination(const Warp& warp, Operand operand) { return (T*)(warp.registers + operand); }

template <class T> inline const T* source(const Warp& warp, Operand operand) {
  return (const T*)((operand < 0 ? warp.constants : warp.registers) + (operand & 0x7fffffff));
}

// One lane's value, its register being `bytes` wide.
inline u8* lane_of(const Warp& warp, Operand operand, int lane, u32 bytes) {
  return destination<u8>(warp, operand) + (size_t)lane * bytes;
}
inline u64 value_of(const Warp& warp, Operand operand, int lane, u32 stride, u32 bytes) {
  u64 value = 0;
  memcpy(&value, source<u8>(warp, operand) + (size_t)lane * stride, bytes);
  return value;
}

inline bool on(u32 lanes, int lane) { return lanes >> lane & 1; }

// Keeps what inactive lanes have.
template <class T> inline void write(T* to, const T* from, u32 lanes) {
  if (lanes == ALL_LANES) { memcpy(to, from, LANES * sizeof(T)); return; }
  for (int i = 0; i < LANES; i++) to[i] = on(lanes, i) ? from[i] : to[i];
}
inline void write_predicate(const Warp& warp, Operand operand, u32 bits, u32 lanes) {
  u32* to = destination<u32>(warp, operand);
  *to = (*to & ~lanes) | (bits & lanes);
}

// for (int lane : each(lanes))
struct Lanes {
  u32 left;
  int operator*() const { return __builtin_ctz(left); }
  Lanes& operator++() { left &= left - 1; return *this; }
  bool operator!=(const Lanes& other) const { return left != other.left; }
  Lanes begin() const { return *this; }
  Lanes end() const { return {0}; }
};
inline Lanes each(u32 lanes) { return {lanes}; }

// Addresses of a memory instruction, for all lanes.
inline void addresses(const Warp& warp, const Instruction& in, u64* to) {
  if (in.base == ABSENT) {
    for (int i = 0; i < LANES; i++) to[i] = in.offset;
  } else if (in.address_bytes == 8) {
    const u64* base = source<u64>(warp, in.base);
    for (int i = 0; i < LANES; i++) to[i] = base[i] + in.offset;
  } else {
    const u32* base = source<u32>(warp, in.base);
    for (int i = 0; i < LANES; i++) to[i] = (u32)(base[i] + (u32)in.offset);
  }
}

// A value of in.element_bytes from memory into one lane's register, extended.
inline void load_element(const Warp& warp, const Instruction& in, Operand operand, int lane, const u8* from) {
  if (operand == ABSENT) return;
  u64 value = 0;
  memcpy(&value, from, in.element_bytes);
  if (in.sign_extend) {
    int unused = 64 - 8 * in.element_bytes;
    value = (u64)((s64)(value << unused) >> unused);
  }
  memcpy(lane_of(warp, operand, lane, in.register_bytes), &value, in.register_bytes);
}

}  // namespace machine
