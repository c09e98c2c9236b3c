// Warps that diverge and meet, barriers, programs, and whose turn it is.
#pragma once

static void fill_special_registers(Warp& w) {
  Launch& launch = *w.launch;
  Kernel* k = launch.kernel;
  Program& program = *w.program;
  Config* g = launch.config;
  for (auto& s : k->specials) {
    u32* r = (u32*)(w.registers + s.first);
    for (int i = 0; i < 32; i++) {
      u32 t = w.id * 32 + i, v = 0;
      switch (s.second) {
        case SP_TIDX: v = t % g->threads[0]; break;
        case SP_TIDY: v = t / g->threads[0] % g->threads[1]; break;
        case SP_TIDZ: v = t / g->threads[0] / g->threads[1]; break;
        case SP_NTIDX: v = g->threads[0]; break;
        case SP_NTIDY: v = g->threads[1]; break;
        case SP_NTIDZ: v = g->threads[2]; break;
        case SP_CTAX: v = program.x; break;
        case SP_CTAY: v = program.y; break;
        case SP_CTAZ: v = program.z; break;
        case SP_NCTAX: v = g->grid[0]; break;
        case SP_NCTAY: v = g->grid[1]; break;
        case SP_NCTAZ: v = g->grid[2]; break;
        case SP_LANE: v = i; break;
        case SP_WARP: v = w.id; break;
        case SP_NWARP: v = (u32)program.warps.size(); break;
        case SP_SMID: v = program.id % 4; break;
        case SP_NSMID: v = 4; break;
        case SP_LMLT: v = (1u << i) - 1; break;
        case SP_LMLE: v = (2u << i) - 1; break;
        case SP_LMGT: v = ~((2u << i) - 1); break;
        case SP_LMGE: v = ~((1u << i) - 1); break;
        case SP_LMEQ: v = 1u << i; break;
      }
      r[i] = v;
    }
  }
}
static Program* start_program(Launch& launch, u64 idx) {
  Config* g = launch.config;
  Program* program = new Program;
  program->id = (int)idx;
  program->x = (int)(idx % g->grid[0]);
  program->y = (int)(idx / g->grid[0] % g->grid[1]);
  program->z = (int)(idx / g->grid[0] / g->grid[1]);
  u32 threads = (u32)g->threads[0] * g->threads[1] * g->threads[2];
  int nw = (threads + 31) / 32;
  program->threads = threads;
  program->live_threads = threads;
  size_t rb = launch.kernel->register_file_bytes;
  program->register_storage.resize(rb * nw + 128);
  char* base = (char*)(((u64)program->register_storage.data() + 63) & ~63ull);
  program->shared_bytes = (size_t)std::max(g->shared + (launch.kernel->static_shared + 15) / 16 * 16, 0);
  program->shared_storage.assign(program->shared_bytes + 64 + 16, (char)0xCD);
  program->shared = (char*)(((u64)program->shared_storage.data() + 63) & ~63ull);
  if (launch.race_mode) program->shadow.assign(program->shared_bytes + 16, ShadowByte{});
  if (g->uninitialised) program->initialised.assign(program->shared_bytes + 16, 0);
  // poison the registers, so that a use of an undefined one shows
  {
    u64 x = 0x7ff7dead7fe5beefull;
    u64* q = (u64*)base;
    for (size_t i = 0; i < rb * nw / 8; i++) q[i] = x;
  }
  program->warps.resize(nw);
  for (int i = 0; i < nw; i++) {
    Warp& w = program->warps[i];
    w.registers = base + rb * i;
    w.constants = launch.kernel->constants_base;
    w.launch = &launch;
    w.program = program;
    w.id = i;
    w.agent = (int)(idx * nw + i);
    u32 lanes = threads - 32 * i >= 32 ? ~0u : (1u << (threads - 32 * i)) - 1;
    w.alive = lanes;
    w.pc = 0;
    w.active = lanes;
    w.has_group = true;
    w.priority = (u32)launch.rng.next();
    fill_special_registers(w);
    launch.ready.push_back(&w);
  }
  launch.programs.push_back(program);
  return program;
}
// The current group has been put into other_groups, or is gone: groups at one place meet, and the one with the
// lowest program counter goes on, so that those behind catch up.
static void pick_group(Warp& w) {
  for (size_t i = 0; i < w.other_groups.size(); i++)
    if (w.other_groups[i].st != GROUP_AT_BARRIER)
      for (size_t j = i + 1; j < w.other_groups.size();) {
        if (w.other_groups[j].st != GROUP_AT_BARRIER && w.other_groups[j].pc == w.other_groups[i].pc) {
          w.other_groups[i].mask |= w.other_groups[j].mask;
          w.other_groups[i].st = GROUP_READY;
          w.other_groups.erase(w.other_groups.begin() + j);
        } else
          j++;
      }
  int best = -1;
  for (size_t i = 0; i < w.other_groups.size(); i++)
    if (w.other_groups[i].st == GROUP_READY && (best < 0 || w.other_groups[i].pc < w.other_groups[best].pc))
      best = (int)i;
  // now and then another one, so that a group that waits for the others cannot starve them
  if (best >= 0 && w.since_switch > 20000) {
    std::vector<int> r;
    for (size_t i = 0; i < w.other_groups.size(); i++)
      if (w.other_groups[i].st == GROUP_READY) r.push_back((int)i);
    best = r[w.launch->rng.below((u32)r.size())];
  }
  w.since_switch = 0;
  if (best < 0) {
    w.has_group = false;
    w.runnable = false;
    w.meeting_pc = 0x7fffffff;
    return;
  }
  w.pc = w.other_groups[best].pc;
  w.active = w.other_groups[best].mask;
  w.other_groups.erase(w.other_groups.begin() + best);
  w.has_group = true;
  w.runnable = true;
  w.meeting_pc = 0x7fffffff;
  for (auto& g : w.other_groups)
    if (g.st != GROUP_AT_BARRIER && g.pc > w.pc && g.pc < w.meeting_pc) w.meeting_pc = g.pc;
}
static void release_barrier(Program& program, int b) {
  Launch& launch = *program.warps[0].launch;
  if (launch.race_mode) {
    std::vector<u32> j(launch.agents, 0);
    std::vector<int> who;
    for (auto& w : program.warps)
      for (auto& g : w.other_groups)
        if (g.st == GROUP_AT_BARRIER && g.bar == b) {
          who.push_back(w.id);
          break;
        }
    for (int i : who) join_clocks(j.data(), launch.clock_of(program.warps[i].agent), launch.agents);
    for (int i : who) {
      memcpy(launch.clock_of(program.warps[i].agent), j.data(), 4 * launch.agents);
      launch.clock_of(program.warps[i].agent)[program.warps[i].agent]++;
    }
  }
  program.barriers[b].arrived = 0;
  program.epoch++;
  for (auto& w : program.warps) {
    bool any = false;
    for (auto& g : w.other_groups)
      if (g.st == GROUP_AT_BARRIER && g.bar == b) {
        g.st = GROUP_READY;
        any = true;
      }
    if (any && !w.has_group) {
      pick_group(w);
      launch.ready.push_back(&w);
    } else if (any) {
      w.other_groups.push_back({w.pc, w.active, GROUP_READY, 0});
      pick_group(w);
    }
  }
}
static void check_barriers(Program& program) {
  for (int b = 0; b < 16; b++)
    if (program.barriers[b].arrived) {
      u32 ex = program.barriers[b].expected ? program.barriers[b].expected : program.live_threads;
      if (program.barriers[b].arrived >= ex) release_barrier(program, b);
    }
}

// runs one warp; returns when it blocks, ends or its quantum is over
static void run_warp(Warp& w, int quantum) {
  Launch& launch = *w.launch;
  const Instruction* code = launch.kernel->code.data();
  u64 *warp_counts = launch.warp_counts, *thread_counts = launch.thread_counts;
  for (; quantum > 0 && !launch.stop; quantum--) {
    const Instruction& in = code[w.pc];
    u32 m = w.active;
    if (in.guard >= 0) {
      u32 g = *destination<u32>(w, in.guard);
      m &= in.guard_negated ? ~g : g;
    }
    launch.instructions_run++;
    warp_counts[w.pc]++;
    thread_counts[w.pc] += __builtin_popcount(m);
    w.since_switch++;
    switch (in.kind) {
      case KIND_PLAIN:
        if (m) in.handler(w, in, m);
        w.pc++;
        break;
      case KIND_WARP_SYNC: {
        u32 member = in.flag == 1 && in.op_class == CLASS_BARRIER ? (u32)in.immediate : (u32)in.target;
        member &= w.alive;
        if (in.op_class == CLASS_SHUFFLE && (in.flag & 8)) member = w.active;
        if (member & ~m & ~w.active) {  // lanes that have still to come
          launch.instructions_run--;
          warp_counts[w.pc]--;
          thread_counts[w.pc] -= __builtin_popcount(m);
          w.other_groups.push_back({w.pc, w.active, GROUP_AWAITS_WARP, 0});
          launch.counters[COUNT_DIVERGENCES]++;
          pick_group(w);
          if (!w.has_group) return;
          continue;
        }
        if (m) in.handler(w, in, m);
        if (in.flag == 1 && in.op_class == CLASS_BARRIER) w.warp_syncs++;
        w.pc++;
        break;
      }
      case KIND_BRANCH: {
        if (m == w.active) {
          w.pc = in.target;
        } else if (!m) {
          w.pc++;
        } else {
          launch.counters[COUNT_DIVERGENCES]++;
          w.other_groups.push_back({in.target, m, GROUP_READY, 0});
          w.other_groups.push_back({w.pc + 1, w.active & ~m, GROUP_READY, 0});
          pick_group(w);
          break;
        }
        if (!w.other_groups.empty()) {
          w.other_groups.push_back({w.pc, w.active, GROUP_READY, 0});
          pick_group(w);
        }
        break;
      }
      case KIND_EXIT: {
        Program& program = *w.program;
        w.alive &= ~m;
        program.live_threads -= __builtin_popcount(m);
        if (m != w.active) {
          w.active &= ~m;
          w.pc++;
          check_barriers(program);
          break;
        }
        if (w.open_copies.size() || w.committed_copies.size()) land_copies(w, 0, true);
        // groups that wait for the lanes that are gone
        for (auto& g : w.other_groups)
          if (g.st == GROUP_AWAITS_WARP) g.st = GROUP_READY;
        if (w.other_groups.empty()) {
          w.has_group = false;
          w.runnable = false;
        } else
          pick_group(w);
        if (!w.alive && !w.done) {
          w.done = true;
          program.done_warps++;
          launch.last_change = launch.instructions_run;
        }
        check_barriers(program);
        if (!w.has_group) return;
        break;
      }
      case KIND_BARRIER: {
        Program& program = *w.program;
        NamedBarrier& b = program.barriers[in.variant];
        if (!m) {
          w.pc++;
          break;
        }
        launch.counters[COUNT_BLOCK_BARRIERS]++;
        if (in.immediate) b.expected = (u32)in.immediate;
        b.arrived += __builtin_popcount(m);
        if (m != w.active) {
          w.other_groups.push_back({w.pc + 1, w.active & ~m, GROUP_READY, 0});
        }
        w.other_groups.push_back({w.pc + 1, m, GROUP_AT_BARRIER, in.variant});
        w.has_group = false;
        u32 ex = b.expected ? b.expected : program.live_threads;
        if (b.arrived >= ex) {
          // release everyone; this warp goes on by itself
          release_barrier(program, in.variant);
          if (!w.has_group) pick_group(w);
          // release_barrier queued this warp as ready although it is running: the caller removes duplicates
          return;
        }
        pick_group(w);
        if (!w.has_group) return;
        break;
      }
      case KIND_TRAP:
        if (m) {
          launch.report("trap", w, in, "trap reached");
          launch.fail(4, "trap" + launch.where(w, in));
        }
        w.pc++;
        break;
      case KIND_NOP: w.pc++; break;
    }
    if (w.pc >= w.meeting_pc && w.has_group) {
      w.other_groups.push_back({w.pc, w.active, GROUP_READY, 0});
      pick_group(w);
    } else if (!w.other_groups.empty() && w.since_switch > 20000) {
      w.other_groups.push_back({w.pc, w.active, GROUP_READY, 0});
      pick_group(w);
    }
  }
}
static std::string dump_waits(Launch& launch) {
  std::string s;
  int k = 0;
  for (Program* program : launch.programs)
    for (auto& w : program->warps) {
      if (w.done || k++ > 40) continue;
      char b[120];
      snprintf(b, sizeof b, "\n  program %d warp %d:", program->id, w.id);
      s += b;
      auto one = [&](int pc, u32 mask, const char* st) {
        const Instruction& in = launch.kernel->code[pc];
        char q[120];
        snprintf(q, sizeof q, " %s lanes %08x at PTX line %d: ", st, mask, in.line);
        s += q;
        s += in.line < (int)launch.kernel->text.size() ? launch.kernel->text[in.line] : "";
        s += in.source_line >= 0 ? " // " + launch.kernel->source_lines[in.source_line] : "";
      };
      if (w.has_group) one(w.pc, w.active, "runs,");
      for (auto& g : w.other_groups)
        one(g.pc, g.mask,
            g.st == GROUP_AT_BARRIER    ? "after bar.sync,"
            : g.st == GROUP_AWAITS_WARP ? "waits for its warp,"
                                        : "ready,");
    }
  return s;
}
static void run(Launch& launch) {
  Config* g = launch.config;
  launch.program_count = (u64)g->grid[0] * g->grid[1] * g->grid[2];
  u64 resident = g->cooperative ? launch.program_count
                                : std::min<u64>(launch.program_count, (u64)std::max(1, g->resident));
  int nw = (g->threads[0] * g->threads[1] * g->threads[2] + 31) / 32;
  launch.agents = (int)(launch.program_count * nw);
  if (launch.race_mode) {
    if ((u64)launch.agents > 2048) {  // clocks are as many as the square of the agents
      launch.race_mode = false;
      launch.counters[COUNT_RACES_UNCHECKED]++;
    }
  }
  if (launch.race_mode) {
    launch.clocks.assign((size_t)launch.agents * launch.agents, 0);
    launch.fence_clocks = launch.clocks;
    launch.pending_clocks = launch.clocks;
    launch.has_fence.assign(launch.agents, 0);
    launch.has_pending.assign(launch.agents, 0);
    for (int a = 0; a < launch.agents; a++) launch.clock_of(a)[a] = 1;
  }
  launch.slow = launch.race_mode || launch.weak;
  std::vector<u64> order;  // programs start in order unless asked otherwise
  for (u64 i = 0; i < launch.program_count; i++) order.push_back(i);
  if (g->shuffle)
    for (u64 i = launch.program_count; i > 1; i--) std::swap(order[i - 1], order[launch.rng.below((u32)i)]);
  while (launch.next_program < resident) start_program(launch, order[launch.next_program++]);
  int q = std::max(1, g->quantum);
  u64 t = 0;
  while (!launch.stop) {
    if (launch.ready.empty()) {
      bool left = false;
      for (Program* program : launch.programs)
        if (program->done_warps < (int)program->warps.size()) left = true;
      if (!left && launch.next_program >= launch.program_count) break;
      if (left) {
        launch.fail(5, "deadlock: no warp can go on" + dump_waits(launch));
        break;
      }
    }
    u32 i = 0;
    if (!g->run_ahead || launch.rng.below(256) == 0)
      i = launch.rng.below((u32)launch.ready.size());  // now and then any: a GPU lets every resident warp go on
    else
      for (u32 k = 1; k < launch.ready.size(); k++)
        if (launch.ready[k]->priority > launch.ready[i]->priority)
          i = k;  // priorities: one warp far ahead of others
    Warp& w = *launch.ready[i];
    launch.ready[i] = launch.ready.back();
    launch.ready.pop_back();
    u64 before = launch.instructions_run;
    run_warp(w, 1 + (q > 1 ? (int)launch.rng.below(2 * q - 1) : 0));
    if (g->run_ahead) {
      w.streak = w.has_group ? w.streak + (u32)(launch.instructions_run - before) : 0;
      if (w.streak > 20000) {
        w.priority >>= 6;
        w.streak = 0;
      }  // it may be waiting for others
      if (launch.rng.below(1000) < (u32)g->run_ahead) w.priority = (u32)launch.rng.next();
    }
    if (w.has_group && std::find(launch.ready.begin(), launch.ready.end(), &w) == launch.ready.end())
      launch.ready.push_back(&w);
    if (launch.weak && (int)launch.rng.below(1000) < g->flush) flush_random(launch);
    Program* program = w.program;
    if (w.done && program->done_warps == (int)program->warps.size()) {
      if (launch.next_program < launch.program_count) start_program(launch, order[launch.next_program++]);
      if (!launch.weak) {
        for (size_t k = 0; k < launch.programs.size(); k++)
          if (launch.programs[k] == program) {
            launch.programs.erase(launch.programs.begin() + k);
            break;
          }
        delete program;
      } else {  // its stores stay buffered until they become visible, at random or at the end
        program->register_storage.clear();
        program->register_storage.shrink_to_fit();
        program->cache.clear();
      }
    }
    if ((++t & 1023) == 0) {
      if (launch.instructions_run > g->most_instructions)
        launch.fail(6, "instruction limit reached" + dump_waits(launch));
      if (launch.instructions_run - launch.last_change > g->stall) {
        if (launch.weak) {
          flush_all(launch);
          launch.last_change = launch.instructions_run - g->stall / 2;
          if (++launch.counters[COUNT_TOTAL] > 2) launch.fail(7, "no progress (livelock)" + dump_waits(launch));
        } else
          launch.fail(7, "no progress (livelock)" + dump_waits(launch));
      }
    }
  }
  if (launch.weak) flush_all(launch);
}
