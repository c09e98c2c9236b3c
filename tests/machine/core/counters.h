// What a launch counts. core.py reads the names, so this is the only list.
#pragma once
#include "instruction.h"

namespace machine {

#define MACHINE_COUNTERS(X) \
  X(warp_instructions) X(thread_instructions) \
  X(load_requests) X(store_requests) X(atomic_requests)            /* global memory: one per warp instruction */ \
  X(load_sectors) X(store_sectors) X(atomic_sectors)               /* of 32 bytes, one per request that touches it */ \
  X(load_bytes) X(store_bytes) X(atomic_threads) \
  X(distinct_read_sectors) X(distinct_written_sectors)             /* of the whole launch */ \
  X(shared_loads) X(shared_stores) \
  X(shared_load_conflicts) X(shared_store_conflicts)               /* further passes because of bank conflicts */ \
  X(block_barriers) X(divergences) \
  X(races) X(races_within)                                         /* all; through global memory in one program */ \
  X(races_unchecked)                                               /* accesses that were too many to keep track of */ \
  X(benign) X(intra_warp) X(uninitialised)

enum class Counter : int {
#define MACHINE_NAME(name) name,
  MACHINE_COUNTERS(MACHINE_NAME)
#undef MACHINE_NAME
  COUNT
};

constexpr const char* COUNTER_NAMES[] = {
#define MACHINE_NAME(name) #name,
  MACHINE_COUNTERS(MACHINE_NAME)
#undef MACHINE_NAME
};

// In the order of Class.
constexpr const char* CLASS_NAMES[] = {
  "int", "fp32", "sfu", "cvt", "mov", "pred", "ld.global", "st.global", "ld.shared", "st.shared", "atom", "mma",
  "ldmatrix", "shfl", "bar", "branch", "cp.async", "param", "local", "other"
};
static_assert(sizeof(CLASS_NAMES) / sizeof(*CLASS_NAMES) == (size_t)Class::COUNT, "a name for every class");

}  // namespace machine
