#include "async_copy.h"
#include <algorithm>
#include "memory.h"
#include "table.h"

namespace machine {

static void land(Warp& warp, const AsyncCopy& copy) {
  const Instruction& in = *copy.in;
  for (int i : each(copy.lanes)) {
    u8 data[16] = {};
    if (copy.bytes[i]) read_global(warp, in, i, copy.from[i], copy.bytes[i], data);
    if (watches_shared(warp)) watch_shared(warp, in, i, copy.to[i], in.elements, data);
    memcpy(warp.program->shared + copy.to[i], data, in.elements);
  }
}

// [to], [from], size {, bytes to read}: base and offset address shared memory, operands[0] and immediate global memory.
void copy_async(Warp& warp, const Instruction& in, u32 lanes) {
  Launch& launch = *warp.launch;
  AsyncCopy copy;
  copy.in = &in;
  copy.lanes = lanes;
  alignas(32) u64 to[LANES];
  addresses(warp, in, to);
  const u64* from = source<u64>(warp, in.operands[0]);
  u32 size = in.elements, reads = 0;
  for (int i = 0; i < LANES; i++) {
    copy.to[i] = (u32)to[i];
    copy.from[i] = from[i] + in.immediate;
    copy.bytes[i] = in.operands[1] == ABSENT ? size : std::min(size, source<u32>(warp, in.operands[1])[i]);
    reads |= (u32)(copy.bytes[i] != 0) << i;
  }
  reads &= lanes;
  if (!check_shared(warp, in, lanes, to, size)) return;
  if (reads) {
    if (!check_global(warp, in, reads, copy.from, size, false)) return;
    count_sectors(warp, reads, copy.from, size, LOADS);
    launch.count(Counter::load_bytes, (u64)size * __builtin_popcount(reads));
  }
  if (launch.races) {  // it writes from now on, whenever it lands
    for (int i : each(lanes)) {
      u8 data[16] = {};
      memcpy(data, (const void*)copy.from[i], copy.bytes[i]);
      watch_shared(warp, in, i, copy.to[i], size, data);
    }
  }
  Copies when = launch.request.copies;
  bool at_once = when == Copies::at_once || (when == Copies::either && launch.random.below(2));
  if (at_once) land(warp, copy); else warp.copies.open.push_back(copy);
}

void commit_copies(Warp& warp, const Instruction&, u32) { warp.copies.commit(); }

void land_copies(Warp& warp, size_t keep, bool open) {
  auto& copies = warp.copies;
  for (; copies.committed.size() > keep; copies.committed.pop_front()) {
    for (const AsyncCopy& copy : copies.committed.front()) land(warp, copy);
  }
  if (!open) return;
  for (const AsyncCopy& copy : copies.open) land(warp, copy);
  copies.open.clear();
}

void wait_copies(Warp& warp, const Instruction& in, u32) { land_copies(warp, (size_t)in.immediate, in.has(ALL)); }

}  // namespace machine
