// Access to memory, lane by lane and for whole warps, for memory.cpp, atomics.cpp, async_copy.cpp and matrix.cpp.
#pragma once
#include "registers.h"

namespace machine {

// Bounds and alignment. False: the launch is stopped.
bool check_global(Warp& warp, const Instruction& in, u32 lanes, const u64* addresses, u32 bytes, bool writes);
bool check_shared(Warp& warp, const Instruction& in, u32 lanes, const u64* addresses, u32 bytes);

struct SectorCounters { Counter requests, sectors; bool reads, writes; };
constexpr SectorCounters LOADS{Counter::load_requests, Counter::load_sectors, true, false};
constexpr SectorCounters STORES{Counter::store_requests, Counter::store_sectors, false, true};
constexpr SectorCounters ATOMICS{Counter::atomic_requests, Counter::atomic_sectors, true, true};
void count_sectors(Warp& warp, u32 lanes, const u64* addresses, u32 bytes, const SectorCounters& as);

// One lane's global access, seen by races and weak memory where they are on.
void read_global(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, u8* to);
void write_global(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, const u8* from);

// Checks of one lane's access to shared memory, before it takes place. from: what is to be written, or null.
bool watches_shared(const Warp& warp);
void watch_shared(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, const u8* from);

}  // namespace machine
