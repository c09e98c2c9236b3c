// Registers to slots of a warp's file.
#pragma once

// Registers whose lives do not meet share a slot: liveness over the flow graph, then a linear scan over whole
// intervals. A lane's slots are its own, so what is right for one thread is right for a warp. Slots are
// shared among registers of one width only.
void Parser::allocate() {
  int n = (int)kernel->code.size();
  std::map<s32, int> id;
  std::vector<s32> offs;
  for (auto& w : widths) {
    id[w.first] = (int)offs.size();
    offs.push_back(w.first);
  }
  int R = (int)offs.size(), W = (R + 63) / 64;
  std::vector<char> lead(n + 1, 0);
  lead[0] = 1;
  for (int i = 0; i < n; i++) {
    Instruction& in = kernel->code[i];
    if (in.kind == KIND_BRANCH) {
      lead[in.target] = 1;
      lead[i + 1] = 1;
    }
    if (in.kind == KIND_EXIT) lead[i + 1] = 1;
  }
  std::vector<int> start;
  for (int i = 0; i < n; i++)
    if (lead[i]) start.push_back(i);
  int B = (int)start.size();
  start.push_back(n);
  std::vector<int> block(n);
  for (int b = 0; b < B; b++)
    for (int i = start[b]; i < start[b + 1]; i++) block[i] = b;
  std::vector<std::vector<u64>> use(B, std::vector<u64>(W)), def = use, in_ = use, out = use;
  std::vector<std::vector<int>> succ(B);
  for (int b = 0; b < B; b++) {
    for (int i = start[b]; i < start[b + 1]; i++) {
      bool partial = kernel->code[i].guard >= 0;
      for (auto& t : touches[i]) {
        int r = id[t.first];
        if (!t.second || partial) {
          if (!(def[b][r >> 6] >> (r & 63) & 1)) use[b][r >> 6] |= 1ull << (r & 63);
        }
      }
      if (!partial)
        for (auto& t : touches[i])
          if (t.second) {
            int r = id[t.first];
            def[b][r >> 6] |= 1ull << (r & 63);
          }
    }
    Instruction& e = kernel->code[start[b + 1] - 1];
    if (e.kind == KIND_BRANCH) {
      succ[b].push_back(block[e.target]);
      if (e.guard >= 0 && b + 1 < B) succ[b].push_back(b + 1);
    } else if (e.kind == KIND_EXIT) {
      if (e.guard >= 0 && b + 1 < B) succ[b].push_back(b + 1);
    } else if (b + 1 < B)
      succ[b].push_back(b + 1);
  }
  for (bool ch = true; ch;) {
    ch = false;
    for (int b = B - 1; b >= 0; b--) {
      for (int x = 0; x < W; x++) {
        u64 o = 0;
        for (int q : succ[b]) o |= in_[q][x];
        u64 ni = use[b][x] | (o & ~def[b][x]);
        if (o != out[b][x] || ni != in_[b][x]) {
          out[b][x] = o;
          in_[b][x] = ni;
          ch = true;
        }
      }
    }
  }
  std::vector<int> lo(R, 1 << 30), hi(R, -1);
  auto ext = [&](int r, int p) {
    lo[r] = std::min(lo[r], p);
    hi[r] = std::max(hi[r], p);
  };
  for (int b = 0; b < B; b++) {
    for (int x = 0; x < W; x++) {
      for (u64 q = in_[b][x]; q; q &= q - 1) ext(x * 64 + __builtin_ctzll(q), start[b]);
      for (u64 q = out[b][x]; q; q &= q - 1) ext(x * 64 + __builtin_ctzll(q), start[b + 1]);
    }
    for (int i = start[b]; i < start[b + 1]; i++)
      for (auto& t : touches[i]) ext(id[t.first], t.second ? i + 1 : i);
  }
  // a definition lives from just after its instruction: sources that end there may give it their slot; but
  // two destinations of one instruction, and a destination nobody reads, must not share
  for (auto& s : kernel->specials) ext(id[s.first], 0);
  std::vector<int> order;
  for (int r = 0; r < R; r++)
    if (hi[r] >= 0) order.push_back(r);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return lo[a] < lo[b]; });
  std::map<s32, s32> moved;
  size_t top = 0;
  std::map<int, std::vector<s32>> pool;
  std::vector<std::pair<int, int>> active;  // (end, reg)
  for (int r : order) {
    int w = widths[offs[r]];
    for (size_t k = 0; k < active.size();) {
      if (active[k].first < lo[r]) {
        pool[widths[offs[active[k].second]]].push_back(moved[offs[active[k].second]]);
        active[k] = active.back();
        active.pop_back();
      } else
        k++;
    }
    s32 o;
    if (pool[w].size()) {
      o = pool[w].back();
      pool[w].pop_back();
    } else {
      o = (s32)top;
      top += w ? (size_t)w * 32 : 32;
    }
    moved[offs[r]] = o;
    active.push_back({hi[r], r});
  }
  auto mv = [&](s32& o) {
    if (o >= 0 && o != NO_REGISTER) {
      auto it = moved.find(o);
      if (it != moved.end()) o = it->second;
    }
  };
  for (auto& in : kernel->code) {
    for (auto& o : in.operand) mv(o);
    for (auto& o : in.accumulators) mv(o);
    mv(in.base);
    if (in.guard >= 0) mv(in.guard);
  }
  for (auto& s : kernel->specials) mv(s.first);
  kernel->register_file_bytes = top;
}

Kernel* parse_ptx(const char* text) {
  auto* kernel = new Kernel;
  Parser parser;
  parser.kernel = kernel;
  parser.t = text;
  parser.n = strlen(text);
  try {
    parser.run();
  } catch (...) {
    delete kernel;
    throw;
  }
  return kernel;
}
