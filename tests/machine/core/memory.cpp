// Loads and stores: global, shared and local memory.
#include "memory.h"
#include <algorithm>
#include "races.h"
#include "table.h"
#include "weak.h"

namespace machine {

// --- checks ----------------------------------------------------------------------------------------------------------

static bool misaligned(Warp& warp, const Instruction& in, const char* memory, u32 bytes) {
  std::string what = text("%s access of %u bytes", memory, bytes);
  warp.launch->report("misaligned", warp, in, what);
  warp.launch->stop(Fault::misaligned, "misaligned: " + what + warp.launch->place(warp, in));
  return false;
}
static bool out_of_bounds(Warp& warp, const Instruction& in, const std::string& what) {
  warp.launch->report("bounds", warp, in, what);
  warp.launch->stop(Fault::bounds, "bounds: " + what + warp.launch->place(warp, in));
  return false;
}

static std::string nearest_storage(const Launch& launch, u64 address, u32 bytes) {
  u64 least = ~0ull;
  const Storage* nearest = nullptr;
  for (const Storage& storage : launch.storages) {
    u64 distance = address < storage.low ? storage.low - address : address + bytes - storage.high;
    if (distance < least) least = distance, nearest = &storage;
  }
  if (!nearest) return "there is none";
  return text("%llu bytes %s one of %llu bytes", (unsigned long long)least,
              address < nearest->low ? "before" : "past the end of",
              (unsigned long long)(nearest->high - nearest->low));
}

bool check_global(Warp& warp, const Instruction& in, u32 lanes, const u64* addresses, u32 bytes, bool writes) {
  Launch& launch = *warp.launch;
  u64 lowest = ~0ull, highest = 0, all_bits = 0;
  for (int i = 0; i < LANES; i++) {
    u64 low = on(lanes, i) ? addresses[i] : ~0ull, high = on(lanes, i) ? addresses[i] : 0;
    lowest = low < lowest ? low : lowest;
    highest = high > highest ? high : highest;
    all_bits |= high;
  }
  if (all_bits & (bytes - 1)) return misaligned(warp, in, "global", bytes);
  if (!launch.request.bounds || launch.find(lowest, highest - lowest + bytes)) return true;
  for (int i : each(lanes)) {
    if (launch.find(addresses[i], bytes) || launch.find_elsewhere(addresses[i], bytes)) continue;
    return out_of_bounds(warp, in,
                         text("%s of %u bytes at %#llx by lane %d, outside of every storage; ",
                              writes ? "write" : "read", bytes, (unsigned long long)addresses[i], i) +
                             nearest_storage(launch, addresses[i], bytes));
  }
  return true;
}

bool check_shared(Warp& warp, const Instruction& in, u32 lanes, const u64* addresses, u32 bytes) {
  u64 highest = 0, all_bits = 0;
  for (int i = 0; i < LANES; i++) {
    u64 address = on(lanes, i) ? addresses[i] : 0;
    highest = address > highest ? address : highest;
    all_bits |= address;
  }
  if (all_bits & (bytes - 1)) return misaligned(warp, in, "shared", bytes);
  if (highest + bytes <= warp.program->shared_bytes) return true;
  return out_of_bounds(warp, in,
                       text("shared access of %u bytes at %llu, of %zu bytes", bytes, (unsigned long long)highest,
                            warp.program->shared_bytes));
}

// --- counting --------------------------------------------------------------------------------------------------------

// A sector may straddle the start or the end of a storage: that of any of its bytes.
static Storage* storage_of_sector(Launch& launch, u64 address) {
  if (Storage* storage = launch.find(address, 1)) return storage;
  if (Storage* storage = launch.find(address + 31, 1)) return storage;
  for (Storage& storage : launch.storages) {
    if (storage.low < address + 32 && storage.high > address) return &storage;
  }
  return nullptr;
}

void count_sectors(Warp& warp, u32 lanes, const u64* addresses, u32 bytes, const SectorCounters& as) {
  Launch& launch = *warp.launch;
  if (!launch.request.sectors) return;
  launch.count(as.requests);
  u64 sectors[2 * LANES], last = ~0ull;
  int count = 0;
  bool ascending = true;
  for (int i : each(lanes)) {
    for (u64 sector = addresses[i] >> 5; sector <= (addresses[i] + bytes - 1) >> 5; sector++) {
      if (sector == last) continue;
      ascending &= count == 0 || sector > last;
      sectors[count++] = last = sector;
    }
  }
  if (!ascending) {
    std::sort(sectors, sectors + count);
    count = (int)(std::unique(sectors, sectors + count) - sectors);
  }
  launch.count(as.sectors, count);
  Storage* storage = nullptr;
  for (int i = 0; i < count; i++) {
    u64 address = sectors[i] << 5;
    if (!storage || address + 31 < storage->low || address >= storage->high)
      storage = storage_of_sector(launch, address);
    if (!storage) continue;
    u64 bit = sectors[i] - (storage->low >> 5);
    if (bit / 64 >= storage->read.size()) continue;
    if (as.reads) storage->read[bit >> 6] |= 1ull << (bit & 63);
    if (as.writes) storage->written[bit >> 6] |= 1ull << (bit & 63);
  }
}

// Further passes that a shared access takes because lanes want different words of one bank. Wide accesses go in parts
// of 128 bytes.
static void count_conflicts(Warp& warp, u32 lanes, const u64* addresses, u32 bytes, Counter counter) {
  if (!warp.launch->request.bank_conflicts) return;
  u32 words = std::max(bytes / 4, 1u), lanes_at_once = LANES / words;
  for (u32 first = 0; first < LANES; first += lanes_at_once) {
    u64 wanted[LANES][LANES];
    int count[LANES] = {}, most = 1;
    for (u32 i = first; i < first + lanes_at_once; i++) {
      for (u32 word = 0; on(lanes, i) && word < words; word++) {
        u64 index = (addresses[i] >> 2) + word;
        int bank = index & 31;
        u64* end = wanted[bank] + count[bank];
        if (std::find(wanted[bank], end, index) == end) *end = index, count[bank]++;
        most = std::max(most, count[bank]);
      }
    }
    warp.launch->count(counter, most - 1);
  }
}

// --- global memory ---------------------------------------------------------------------------------------------------

void read_global(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, u8* to) {
  Launch& launch = *warp.launch;
  if (launch.races) launch.races->global_read(warp, in, lane, address, bytes);
  if (launch.weak) weak_load(warp, address, bytes, to, in.order); else memcpy(to, (const void*)address, bytes);
}

void write_global(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, const u8* from) {
  Launch& launch = *warp.launch;
  if (launch.races) {
    u8 old[32];
    if (launch.weak) weak_load(warp, address, bytes, old, PAST_L1); else memcpy(old, (const void*)address, bytes);
    launch.races->global_write(warp, in, lane, address, bytes, old, from);
  }
  if (launch.weak) weak_store(warp, lane, address, bytes, from, in.order); else memcpy((void*)address, from, bytes);
}

template <class T> static void gather(Warp& warp, Operand operand, u32 lanes, const u64* addresses, size_t offset) {
  T* to = destination<T>(warp, operand);
  if (lanes == ALL_LANES) {
    for (int i = 0; i < LANES; i++) to[i] = *(const T*)(addresses[i] + offset);
  } else {
    for (int i : each(lanes)) to[i] = *(const T*)(addresses[i] + offset);
  }
}
template <class T> static void scatter(Warp& warp, Operand operand, u32 lanes, const u64* addresses, size_t offset) {
  const T* from = source<T>(warp, operand);
  for (int i : each(lanes)) *(T*)(addresses[i] + offset) = from[i];
}

// All elements of lanes whose memory is plain; false: the widths are unusual.
static bool gather_all(Warp& warp, const Instruction& in, u32 lanes, const u64* addresses) {
  if (in.element_bytes != in.register_bytes) return false;
  for (int e = 0; e < in.elements; e++) {
    if (in.operands[e] == ABSENT) continue;
    size_t offset = (size_t)e * in.element_bytes;
    switch (in.element_bytes) {
      case 2: gather<u16>(warp, in.operands[e], lanes, addresses, offset); break;
      case 4: gather<u32>(warp, in.operands[e], lanes, addresses, offset); break;
      case 8: gather<u64>(warp, in.operands[e], lanes, addresses, offset); break;
      default: gather<unsigned __int128>(warp, in.operands[e], lanes, addresses, offset);
    }
  }
  return true;
}
static bool scatter_all(Warp& warp, const Instruction& in, u32 lanes, const u64* addresses) {
  if (in.element_bytes != in.register_bytes) return false;
  for (int e = 0; e < in.elements; e++) {
    size_t offset = (size_t)e * in.element_bytes;
    switch (in.element_bytes) {
      case 2: scatter<u16>(warp, in.operands[e], lanes, addresses, offset); break;
      case 4: scatter<u32>(warp, in.operands[e], lanes, addresses, offset); break;
      case 8: scatter<u64>(warp, in.operands[e], lanes, addresses, offset); break;
      default: scatter<unsigned __int128>(warp, in.operands[e], lanes, addresses, offset);
    }
  }
  return true;
}

static void registers_from(Warp& warp, const Instruction& in, int lane, const u8* from) {
  for (int e = 0; e < in.elements; e++) load_element(warp, in, in.operands[e], lane, from + e * in.element_bytes);
}
static void registers_to(Warp& warp, const Instruction& in, int lane, u8* to) {
  for (int e = 0; e < in.elements; e++) {
    memcpy(to + e * in.element_bytes, source<u8>(warp, in.operands[e]) + (size_t)lane * in.register_bytes,
           in.element_bytes);
  }
}

void load_global(Warp& warp, const Instruction& in, u32 lanes) {
  Launch& launch = *warp.launch;
  alignas(32) u64 at[LANES];
  addresses(warp, in, at);
  u32 bytes = in.elements * in.element_bytes;
  if (!check_global(warp, in, lanes, at, bytes, false)) return;
  count_sectors(warp, lanes, at, bytes, LOADS);
  launch.count(Counter::load_bytes, (u64)bytes * __builtin_popcount(lanes));
  if (launch.simple && gather_all(warp, in, lanes, at)) return;
  for (int i : each(lanes)) {
    u8 data[32];
    read_global(warp, in, i, at[i], bytes, data);
    registers_from(warp, in, i, data);
  }
  if (launch.weak && (in.order & ACQUIRE)) forget_lines(warp);
}

void store_global(Warp& warp, const Instruction& in, u32 lanes) {
  Launch& launch = *warp.launch;
  alignas(32) u64 at[LANES];
  addresses(warp, in, at);
  u32 bytes = in.elements * in.element_bytes;
  if (!check_global(warp, in, lanes, at, bytes, true)) return;
  count_sectors(warp, lanes, at, bytes, STORES);
  launch.count(Counter::store_bytes, (u64)bytes * __builtin_popcount(lanes));
  launch.last_change = launch.moment;
  if (launch.simple && scatter_all(warp, in, lanes, at)) return;
  for (int i : each(lanes)) {
    u8 data[32];
    registers_to(warp, in, i, data);
    write_global(warp, in, i, at[i], bytes, data);
  }
}

// --- shared memory ---------------------------------------------------------------------------------------------------

bool watches_shared(const Warp& warp) { return warp.launch->races || warp.launch->request.uninitialised; }

void watch_shared(Warp& warp, const Instruction& in, int lane, u64 address, u32 bytes, const u8* from) {
  Launch& launch = *warp.launch;
  Program& program = *warp.program;
  if (launch.races && from)
    launch.races->shared_write(warp, in, lane, address, bytes, (const u8*)program.shared + address, from);
  if (launch.races && !from) launch.races->shared_read(warp, in, lane, address, bytes);
  if (!launch.request.uninitialised) return;
  u8* initialised = &program.initialised[address];
  if (from) {
    memset(initialised, 1, bytes);
  } else if (u8* unwritten = std::find(initialised, initialised + bytes, 0); unwritten != initialised + bytes) {
    launch.count(Counter::uninitialised);
    launch.report("uninitialised", warp, in, text("lane %d reads shared byte %llu, which nobody wrote", lane,
                                                  (unsigned long long)(address + (unwritten - initialised))));
  }
}

void load_shared(Warp& warp, const Instruction& in, u32 lanes) {
  alignas(32) u64 at[LANES];
  addresses(warp, in, at);
  u32 bytes = in.elements * in.element_bytes;
  if (!check_shared(warp, in, lanes, at, bytes)) return;
  warp.launch->count(Counter::shared_loads);
  count_conflicts(warp, lanes, at, bytes, Counter::shared_load_conflicts);
  if (watches_shared(warp)) {
    for (int i : each(lanes)) watch_shared(warp, in, i, at[i], bytes, nullptr);
  }
  for (u64& address : at) address += (u64)warp.program->shared;
  if (gather_all(warp, in, lanes, at)) return;
  for (int i : each(lanes)) registers_from(warp, in, i, (const u8*)at[i]);
}

void store_shared(Warp& warp, const Instruction& in, u32 lanes) {
  alignas(32) u64 at[LANES];
  addresses(warp, in, at);
  u32 bytes = in.elements * in.element_bytes;
  if (!check_shared(warp, in, lanes, at, bytes)) return;
  warp.launch->count(Counter::shared_stores);
  count_conflicts(warp, lanes, at, bytes, Counter::shared_store_conflicts);
  u64 shared = (u64)warp.program->shared;
  if (!watches_shared(warp)) {
    for (u64& address : at) address += shared;
    if (scatter_all(warp, in, lanes, at)) return;
    for (int i : each(lanes)) registers_to(warp, in, i, (u8*)at[i]);
    return;
  }
  for (int i : each(lanes)) {
    u8 data[32];
    registers_to(warp, in, i, data);
    watch_shared(warp, in, i, at[i], bytes, data);
    memcpy((void*)(shared + at[i]), data, bytes);
  }
}

// --- local memory ----------------------------------------------------------------------------------------------------

// Addresses in local memory are offsets in the thread's own part.
static bool local_addresses(Warp& warp, const Instruction& in, u32 lanes, u64* at) {
  addresses(warp, in, at);
  u32 bytes = in.elements * in.element_bytes;
  size_t size = warp.launch->kernel.local_bytes;
  for (int i : each(lanes)) {
    if (at[i] % bytes) return misaligned(warp, in, "local", bytes);
    if (at[i] + bytes > size)
      return out_of_bounds(warp, in, text("local access at %llu, of %zu bytes", (unsigned long long)at[i], size));
    at[i] += (u64)warp.local + i * size;
  }
  return true;
}

void load_local(Warp& warp, const Instruction& in, u32 lanes) {
  u64 at[LANES];
  if (!local_addresses(warp, in, lanes, at)) return;
  for (int i : each(lanes)) registers_from(warp, in, i, (const u8*)at[i]);
}

void store_local(Warp& warp, const Instruction& in, u32 lanes) {
  u64 at[LANES];
  if (!local_addresses(warp, in, lanes, at)) return;
  for (int i : each(lanes)) registers_to(warp, in, i, (u8*)at[i]);
}

}  // namespace machine
