// Who runs when. Programs start as others end; their warps take turns in a random order; within a warp, lanes that went
// different ways form groups, of which the one with the lowest pc runs until it meets another.
#include <algorithm>
#include "async_copy.h"
#include "machine.h"
#include "races.h"
#include "registers.h"
#include "weak.h"

namespace machine {

constexpr int NO_LIMIT = 0x7fffffff;
constexpr u32 PATIENCE = 20000;  // instructions after which a group, or a warp of high priority, lets others go on

// --- groups of a warp ------------------------------------------------------------------------------------------------

static void join_groups(Warp& warp) {
  std::vector<Group>& groups = warp.others;
  for (size_t i = 0; i < groups.size(); i++) {
    if (groups[i].state == Waiting::at_barrier) continue;
    for (size_t j = i + 1; j < groups.size();) {
      if (groups[j].state == Waiting::at_barrier || groups[j].pc != groups[i].pc) { j++; continue; }
      groups[i].lanes |= groups[j].lanes;
      groups[i].state = Waiting::ready;
      groups.erase(groups.begin() + j);
    }
  }
}

// The next group to run: the ready one with the lowest pc; now and then any, so that a group which waits for others
// cannot starve them.
static void pick_group(Warp& warp) {
  join_groups(warp);
  std::vector<Group>& groups = warp.others;
  int best = -1, count = 0;
  bool any = warp.since_switch > PATIENCE;
  for (int i = 0; i < (int)groups.size(); i++) {
    if (groups[i].state != Waiting::ready) continue;
    count++;
    bool better = any ? warp.launch->random.below(count) == 0 : groups[i].pc < groups[best].pc;
    if (best < 0 || better) best = i;
  }
  warp.since_switch = 0;
  warp.limit = NO_LIMIT;
  warp.running = best >= 0;
  if (!warp.running) return;
  warp.pc = groups[best].pc;
  warp.active = groups[best].lanes;
  groups.erase(groups.begin() + best);
  for (const Group& group : groups) {
    if (group.state != Waiting::at_barrier && group.pc > warp.pc) warp.limit = std::min(warp.limit, group.pc);
  }
}

// The group that runs steps aside.
static void put_aside(Warp& warp, Waiting state = Waiting::ready) {
  warp.others.push_back({warp.pc, warp.active, state, 0});
}

static void enqueue(Warp& warp) {
  if (warp.queued) return;
  warp.queued = true;
  warp.launch->ready.push_back(&warp);
}

// --- barriers --------------------------------------------------------------------------------------------------------

static void release_barrier(Program& program, int number) {
  Launch& launch = *program.warps[0].launch;
  std::vector<int> arrived;
  for (Warp& warp : program.warps) {
    bool waits = false;
    for (Group& group : warp.others) {
      if (group.state != Waiting::at_barrier || group.barrier != number) continue;
      group.state = Waiting::ready;
      waits = true;
    }
    if (waits) arrived.push_back(warp.index);
  }
  if (launch.races) launch.races->barrier(program, arrived);
  program.barriers[number].arrived = 0;
  program.epoch++;
  for (int i : arrived) {
    Warp& warp = program.warps[i];
    if (warp.running) put_aside(warp);
    pick_group(warp);
    enqueue(warp);
  }
}

static bool complete(const Program& program, const Barrier& barrier) {
  return barrier.arrived && barrier.arrived >= (barrier.expected ? barrier.expected : program.alive);
}

// Threads that end are no longer waited for.
static void release_complete_barriers(Program& program) {
  for (int number = 0; number < 16; number++) {
    if (complete(program, program.barriers[number])) release_barrier(program, number);
  }
}

// --- instructions that the scheduler executes ------------------------------------------------------------------------

static void branch(Warp& warp, const Instruction& in, u32 taken) {
  if (taken && taken != warp.active) {
    warp.launch->count(Counter::divergences);
    warp.others.push_back({in.target, taken, Waiting::ready, 0});
    warp.active &= ~taken;
    warp.pc++;
    put_aside(warp);
    return pick_group(warp);
  }
  warp.pc = taken ? in.target : warp.pc + 1;
  if (warp.others.empty()) return;
  put_aside(warp);
  pick_group(warp);
}

static void exit(Warp& warp, u32 lanes) {
  Program& program = *warp.program;
  warp.alive &= ~lanes;
  program.alive -= __builtin_popcount(lanes);
  if (lanes != warp.active) {
    warp.active &= ~lanes;
    warp.pc++;
    return release_complete_barriers(program);
  }
  if (!warp.copies.empty()) land_copies(warp, 0, true);
  for (Group& group : warp.others) {  // they need not wait for the lanes that are gone
    if (group.state == Waiting::for_warp) group.state = Waiting::ready;
  }
  pick_group(warp);
  if (!warp.alive) {
    warp.done = true;
    program.done_warps++;
    warp.launch->last_change = warp.launch->moment;
  }
  release_complete_barriers(program);
}

static void arrive(Warp& warp, const Instruction& in, u32 lanes) {
  if (!lanes) { warp.pc++; return; }
  Barrier& barrier = warp.program->barriers[in.variant];
  warp.launch->count(Counter::block_barriers);
  if (in.immediate) barrier.expected = (u32)in.immediate;
  barrier.arrived += __builtin_popcount(lanes);
  warp.pc++;
  if (lanes != warp.active) warp.others.push_back({warp.pc, warp.active & ~lanes, Waiting::ready, 0});
  warp.others.push_back({warp.pc, lanes, Waiting::at_barrier, in.variant});
  warp.running = false;
  if (complete(*warp.program, barrier)) release_barrier(*warp.program, in.variant); else pick_group(warp);
}

// False: lanes have still to come, the group waits for them (and has not executed the instruction).
static bool collect(Warp& warp, const Instruction& in, u32 lanes) {
  u32 members = in.members;
  if (in.member_mask != ABSENT && lanes) members = source<u32>(warp, in.member_mask)[__builtin_ctz(lanes)];
  if (!(members & warp.alive & ~warp.active)) return true;
  put_aside(warp, Waiting::for_warp);
  warp.launch->count(Counter::divergences);
  pick_group(warp);
  return false;
}

// --- a turn of a warp ------------------------------------------------------------------------------------------------

// Runs until it blocks or ends, or for so many instructions; and until a barrier that it completed has queued it again.
static void run_warp(Warp& warp, int instructions) {
  Launch& launch = *warp.launch;
  const Instruction* code = launch.kernel.code.data();
  for (; instructions > 0 && warp.running && !warp.queued && !launch.stopped; instructions--) {
    const Instruction& in = code[warp.pc];
    u32 lanes = warp.active;
    if (in.guard != ABSENT) {
      u32 predicate = *source<u32>(warp, in.guard);
      lanes &= in.guard_negated ? ~predicate : predicate;
    }
    if (in.kind == Kind::collective && !collect(warp, in, lanes)) continue;
    launch.moment++;
    launch.warp_counts[in.index]++;
    launch.thread_counts[in.index] += __builtin_popcount(lanes);
    warp.since_switch++;
    switch (in.kind) {
      case Kind::plain:
      case Kind::collective:
        if (lanes) in.execute(warp, in, lanes);
        warp.pc++;
        break;
      case Kind::branch: branch(warp, in, lanes); break;
      case Kind::exit: exit(warp, lanes); break;
      case Kind::barrier: arrive(warp, in, lanes); break;
      case Kind::trap:
        if (lanes) {
          launch.report("trap", warp, in, "reached");
          launch.stop(Fault::trap, "trap" + launch.place(warp, in));
        }
        warp.pc++;
        break;
    }
    bool steps_aside = warp.pc >= warp.limit || (warp.since_switch > PATIENCE && !warp.others.empty());
    if (steps_aside && warp.running) {
      put_aside(warp);
      pick_group(warp);
    }
  }
}

// --- programs --------------------------------------------------------------------------------------------------------

static u32 special_value(const Program& program, const Warp& warp, const Request& request, Special which, int lane) {
  const s32 *threads = request.threads, *grid = request.grid;
  u32 thread = warp.index * LANES + lane;
  switch (which) {
    case Special::tid_x: return thread % threads[0];
    case Special::tid_y: return thread / threads[0] % threads[1];
    case Special::tid_z: return thread / threads[0] / threads[1];
    case Special::ntid_x: return threads[0];
    case Special::ntid_y: return threads[1];
    case Special::ntid_z: return threads[2];
    case Special::ctaid_x: return program.x;
    case Special::ctaid_y: return program.y;
    case Special::ctaid_z: return program.z;
    case Special::nctaid_x: return grid[0];
    case Special::nctaid_y: return grid[1];
    case Special::nctaid_z: return grid[2];
    case Special::laneid: return lane;
    case Special::warpid: return warp.index;
    case Special::nwarpid: return (u32)program.warps.size();
    case Special::smid: return program.id % 4;
    case Special::nsmid: return 4;
    case Special::lanemask_lt: return (1u << lane) - 1;
    case Special::lanemask_le: return (2u << lane) - 1;
    case Special::lanemask_gt: return ~((2u << lane) - 1);
    case Special::lanemask_ge: return ~((1u << lane) - 1);
    case Special::lanemask_eq: return 1u << lane;
  }
  return 0;
}

static char* aligned(std::vector<char>& memory, size_t bytes, char fill) {
  memory.assign(bytes + 128, fill);
  return (char*)(((u64)memory.data() + 63) & ~63ull);
}

static void start_warp(Launch& launch, Program& program, int index, char* registers, char* local) {
  const Kernel& kernel = launch.kernel;
  Warp& warp = program.warps[index];
  warp.registers = registers + kernel.register_bytes * index;
  warp.constants = kernel.constants.data;
  warp.local = local + kernel.local_bytes * LANES * index;
  warp.launch = &launch;
  warp.program = &program;
  warp.index = index;
  warp.agent = (u32)(program.id * launch.warps_per_program + index);
  u32 lanes = program.alive - LANES * index;
  warp.alive = warp.active = lanes >= LANES ? ALL_LANES : (1u << lanes) - 1;
  warp.running = true;
  warp.priority = (u32)launch.random.next();
  for (auto& [where, which] : kernel.specials) {
    u32* to = destination<u32>(warp, where);
    for (int lane = 0; lane < LANES; lane++) to[lane] = special_value(program, warp, launch.request, which, lane);
  }
  enqueue(warp);
}

static void start_program(Launch& launch, u64 id) {
  const Kernel& kernel = launch.kernel;
  const Request& request = launch.request;
  launch.programs.push_back(std::make_unique<Program>());
  Program& program = *launch.programs.back();
  program.id = (int)id;
  program.x = (int)(id % request.grid[0]);
  program.y = (int)(id / request.grid[0] % request.grid[1]);
  program.z = (int)(id / request.grid[0] / request.grid[1]);
  program.alive = (u32)request.threads[0] * request.threads[1] * request.threads[2];
  program.shared_bytes = (size_t)std::max(request.shared + (kernel.static_shared + 15) / 16 * 16, 0);
  program.shared = aligned(program.shared_memory, program.shared_bytes, (char)0xCD);
  int warps = launch.warps_per_program;
  // Undefined registers hold something that shows.
  char* registers = aligned(program.register_memory, kernel.register_bytes * warps, 0);
  std::fill_n((u64*)registers, kernel.register_bytes * warps / 8, 0x7ff7dead7fe5beefull);
  char* local =
      kernel.local_bytes ? aligned(program.local_memory, kernel.local_bytes * LANES * warps, (char)0xCD) : nullptr;
  if (launch.races) {
    program.history.assign(program.shared_bytes + 16, ByteHistory{});
    launch.races->start(program);
  }
  if (request.uninitialised) program.initialised.assign(program.shared_bytes + 16, 0);
  program.warps.resize(warps);
  for (int i = 0; i < warps; i++) start_warp(launch, program, i, registers, local);
}

// In weak memory a program's stores may outlive it: they become visible at random, or at the end.
static void end_program(Launch& launch, Program& program) {
  if (launch.races) launch.races->end(program);
  if (launch.weak && !program.buffer.empty()) {
    program.l1.clear();
    program.history = {};
    program.register_memory = program.shared_memory = program.local_memory = {};
    return;
  }
  auto is_it = [&](const std::unique_ptr<Program>& other) { return other.get() == &program; };
  launch.programs.erase(std::find_if(launch.programs.begin(), launch.programs.end(), is_it));
}

// --- the launch ------------------------------------------------------------------------------------------------------

static std::string where_warps_wait(const Launch& launch) {
  std::string told;
  int count = 0;
  auto tell = [&](int pc, u32 lanes, const char* state) {
    const Instruction& in = launch.kernel.code[pc];
    told += text(" %s lanes %08x at %s (PTX line %d: %s)", state, lanes, launch.source(in).c_str(), in.line,
                 launch.kernel.text_of(in).c_str());
  };
  for (auto& program : launch.programs) {
    for (const Warp& warp : program->warps) {
      if (warp.done || count++ > 40) continue;
      told += text("\n  program %d warp %d:", program->id, warp.index);
      if (warp.running) tell(warp.pc, warp.active, "runs,");
      for (const Group& group : warp.others) {
        tell(group.pc, group.lanes, group.state == Waiting::at_barrier ? "after bar.sync," :
             group.state == Waiting::for_warp ? "waits for its warp," : "ready,");
      }
    }
  }
  return told;
}

struct Turns {
  Launch& launch;
  const Request& request;
  std::vector<u64> order;
  u64 turn = 0;
  int rescues = 0;

  explicit Turns(Launch& launch) : launch(launch), request(launch.request) {
    u64 count = launch.program_count;
    for (u64 i = 0; i < count; i++) order.push_back(i);
    for (u64 i = count; request.shuffle && i > 1; i--) std::swap(order[i - 1], order[launch.random.below((u32)i)]);
    u64 resident = request.cooperative ? count : std::min<u64>(count, std::max(1, request.resident));
    while (launch.next_program < resident) start_next();
  }
  void start_next() { start_program(launch, order[launch.next_program++]); }

  // Any warp that can go on; with priorities mostly that of the highest, and now and then any, as a GPU lets every warp
  // go on.
  Warp& choose() {
    std::vector<Warp*>& ready = launch.ready;
    u32 chosen = 0;
    if (!request.run_ahead || launch.random.below(256) == 0) {
      chosen = launch.random.below((u32)ready.size());
    } else {
      for (u32 i = 1; i < ready.size(); i++) {
        if (ready[i]->priority > ready[chosen]->priority) chosen = i;
      }
    }
    std::swap(ready[chosen], ready.back());
    Warp& warp = *ready.back();
    ready.pop_back();
    warp.queued = false;
    return warp;
  }

  void change_priority(Warp& warp, u64 ran) {
    warp.streak = warp.running ? warp.streak + (u32)ran : 0;
    if (warp.streak > PATIENCE) {  // it may be waiting for others
      warp.priority >>= 6;
      warp.streak = 0;
    }
    if (launch.random.chance(request.run_ahead)) warp.priority = (u32)launch.random.next();
  }

  void check_progress() {
    if (launch.moment - launch.last_change <= request.stall) return;
    if (launch.weak && rescues++ < 2) {  // what is waited for may be in a store buffer
      flush_all(launch);
      launch.last_change = launch.moment - request.stall / 2;
      return;
    }
    launch.stop(Fault::livelock, "no progress (livelock)" + where_warps_wait(launch));
  }

  void take_turn() {
    Warp& warp = choose();
    u64 before = launch.moment;
    int mean = std::max(1, request.quantum);
    run_warp(warp, 1 + (mean > 1 ? (int)launch.random.below(2 * mean - 1) : 0));
    if (request.run_ahead) change_priority(warp, launch.moment - before);
    if (warp.running) enqueue(warp);
    if (launch.weak && launch.random.chance(request.flush)) flush_one(launch);
    if (warp.done && warp.program->done()) {
      end_program(launch, *warp.program);
      if (launch.next_program < launch.program_count) start_next();
    }
    if (++turn % 1024 == 0) check_progress();
  }
};

void Launch::run() {
  Turns turns(*this);
  while (!stopped && !ready.empty()) turns.take_turn();
  auto left = [](const std::unique_ptr<Program>& program) { return !program->done(); };
  if (!stopped && std::any_of(programs.begin(), programs.end(), left)) {
    stop(Fault::deadlock, "deadlock: no warp can go on" + where_warps_wait(*this));
  }
  if (weak) flush_all(*this);
}

}  // namespace machine
