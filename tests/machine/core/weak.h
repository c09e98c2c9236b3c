// Weak memory: what one program's plain stores and loads may do to the others. Every program has a store buffer, whose
// words become visible to the others at a release that orders them, or at random; and a first-level cache for plain
// loads that nobody keeps coherent: an acquire or a fence empties it. Warps of one program share both, as they share an
// L1, and see each other's stores at once.
//
// A release by one thread publishes its own stores, and those of other warps that a bar.sync has ordered before it
// (earlier epochs). Where the barrier is missing they stay buffered: that is how it shows.
#pragma once
#include "machine.h"

namespace machine {

void weak_load(Warp& warp, u64 address, u32 bytes, u8* to, u8 order);
void weak_store(Warp& warp, int lane, u64 address, u32 bytes, const u8* from, u8 order);
void release_stores(Warp& warp, u32 lanes);                     // what a release by these lanes orders
void meet_memory(Warp& warp, u64 address, u32 bytes);           // before an atomic: neither buffered nor cached
void forget_lines(Warp& warp);                                  // an acquire
void flush_one(Launch& launch);                                 // a random word of a random program
void flush_all(Launch& launch);

}  // namespace machine
