// What lanes of a warp do together, and moves that are no arithmetic.
#pragma once

H(shuffle) {  // variant: 0 up 1 down 2 bfly 3 idx; o[0] d, o[1] a, o[2] b, o[3] c, o[5] predicate destination
  u32* d = destination<u32>(w, in.operand[0]);
  const u32 *a = source<u32>(w, in.operand[1]), *b = source<u32>(w, in.operand[2]),
            *c = source<u32>(w, in.operand[3]);
  u32 t[32], p = 0;
  for (int i = 0; i < 32; i++) {
    u32 seg = (c[i] >> 8) & 31, cv = c[i] & 31, bv = b[i] & 31, mx = (i & seg) | (cv & ~seg), mn = i & seg;
    s32 j;
    bool ok;
    switch (in.variant) {
      case 0:
        j = i - (s32)bv;
        ok = j >= (s32)mx;
        break;
      case 1:
        j = i + (s32)bv;
        ok = j <= (s32)mx;
        break;
      case 2:
        j = i ^ bv;
        ok = j <= (s32)mx;
        break;
      default: j = mn | (bv & ~seg); ok = j <= (s32)mx;
    }
    if (!ok) j = i;
    p |= (u32)ok << i;
    if (ok && (m >> i) & 1 && !((m >> j) & 1))
      w.launch->report("shfl from an inactive lane", w, in,
                       "lane " + std::to_string(i) + " reads " + std::to_string(j));
    t[i] = a[j];
  }
  merge_lanes(d, t, m);
  if (in.operand[5] != NO_REGISTER) {
    u32* q = destination<u32>(w, in.operand[5]);
    *q = (*q & ~m) | (p & m);
  }
}
H(shuffle_butterfly) {  // common form: uniform immediate, full warp
  u32* d = destination<u32>(w, in.operand[0]);
  const u32* a = source<u32>(w, in.operand[1]);
  u32 t[32], x = (u32)in.immediate;
  if (m != ~0u) {
    shuffle(w, in, m);
    return;
  }
  for (int i = 0; i < 32; i++) t[i] = a[i ^ x];
  memcpy(d, t, sizeof t);
}
H(vote) {  // variant: 0 all 1 any 2 uni 3 ballot
  u32 p = *source<u32>(w, in.operand[1]);
  if (in.flag) p = ~p;
  u32 b = p & m;
  if (in.variant == 3) {
    u32* d = destination<u32>(w, in.operand[0]);
    LANES d[i] = b;
    return;
  }
  bool r = in.variant == 0 ? b == m : in.variant == 1 ? b != 0 : (b == m || b == 0);
  u32* d = destination<u32>(w, in.operand[0]);
  *d = (*d & ~m) | (r ? m : 0);
}
H(active_mask) {
  u32* d = destination<u32>(w, in.operand[0]);
  LANES d[i] = m;
}
H(match_lanes) {
  u32* d = destination<u32>(w, in.operand[0]);
  u32 t[32];
  LANES {
    u32 r = 0;
    for (int j = 0; j < 32; j++)
      if ((m >> j) & 1) {
        bool eq = in.register_bytes == 8 ? source<u64>(w, in.operand[1])[i] == source<u64>(w, in.operand[1])[j]
                                         : source<u32>(w, in.operand[1])[i] == source<u32>(w, in.operand[1])[j];
        r |= (u32)eq << j;
      }
    if (in.flag) r = r == m ? m : 0;
    t[i] = r;
  }
  merge_lanes(d, t, m);
}
H(reduce_warp) {
  const u32* a = source<u32>(w, in.operand[1]);
  u32 r = 0;
  bool first = true;
  LANES {
    u32 x = a[i];
    if (first) {
      r = x;
      first = false;
      continue;
    }
    switch (in.variant) {
      case A_ADD: r += x; break;
      case A_MIN: r = in.type == TYPE_S32 ? (u32)std::min((s32)r, (s32)x) : std::min(r, x); break;
      case A_MAX: r = in.type == TYPE_S32 ? (u32)std::max((s32)r, (s32)x) : std::max(r, x); break;
      case A_AND: r &= x; break;
      case A_OR: r |= x; break;
      default: r ^= x;
    }
  }
  u32* d = destination<u32>(w, in.operand[0]);
  LANES d[i] = r;
}
H(do_nothing) {}
H(load_parameter) {  // immediate: offset in the parameter block; uniform
  const char* p = w.launch->parameters.data() + in.immediate;
  for (int v = 0; v < in.vector; v++) {
    if (in.operand[v] == NO_REGISTER) continue;
    LANES set_element(w, in, in.operand[v], i, (const u8*)p + v * in.element_bytes);
  }
}
H(pack_registers) {  // mov.bN d, {a, b, ..}: vector parts of element_bytes bytes (registers register_bytes
                     // wide)
  LANES {
    u64 r = 0;
    for (int v = 0; v < in.vector; v++) {
      u64 x = 0;
      memcpy(&x, source<u8>(w, in.operand[1 + v]) + (size_t)i * in.register_bytes, in.element_bytes);
      r |= x << (8 * in.element_bytes * v);
    }
    memcpy(w.registers + in.operand[0] + (size_t)i * in.source_bytes, &r, in.source_bytes);
  }
}
H(unpack_registers) {  // mov.bN {a, b, ..}, s
  u32 W = in.source_bytes;
  LANES {
    u64 x = 0;
    memcpy(&x, source<u8>(w, in.operand[0]) + (size_t)i * W, W);
    for (int v = 0; v < in.vector; v++) {
      if (in.operand[1 + v] == NO_REGISTER) continue;
      u64 y = x >> (8 * in.element_bytes * v);
      if (in.element_bytes < 8) y &= (1ull << (8 * in.element_bytes)) - 1;
      memcpy(w.registers + in.operand[1 + v] + (size_t)i * in.register_bytes, &y, in.register_bytes);
    }
  }
}
H(read_clock) {
  LANES {
    u64 t = w.launch->instructions_run;
    memcpy(w.registers + in.operand[0] + (size_t)i * in.register_bytes, &t, in.register_bytes);
  }
}
H(compare_and_combine) {  // setp.cmp.bool: done as setp into o[0], then combined with o[3]; variant: 0 and 1 or
                          // 2 xor
  Instruction t = in;
  t.operand[2] = in.operand[2];
  u32* d = destination<u32>(w, in.operand[0]);
  u32 before = *d, c = *source<u32>(w, in.operand[3]);
  ((Handler)(void*)in.immediate)(w, t, ~0u);
  u32 r = *d;
  if (in.flag) c = ~c;
  r = in.variant == 0 ? r & c : in.variant == 1 ? r | c : r ^ c;
  *d = (before & ~m) | (r & m);
}
// setp.cmp.f16x2 p|q, a, b: the scalar comparison of the halves, the lower one's result first. immediate: that
// comparison.
H(compare_pair) {
  u32 results[2];
  const u32 *a = source<u32>(w, in.operand[1]), *b = source<u32>(w, in.operand[2]);
  struct {
    u16 left[32], right[32];
    u32 result[8];
  } file = {};
  Warp view;  // of these registers alone
  view.registers = (char*)&file;
  Instruction half;
  half.operand[0] = sizeof file.left + sizeof file.right;
  half.operand[1] = 0;
  half.operand[2] = sizeof file.left;
  u32 before = *destination<u32>(w, in.operand[0]);
  for (int h = 0; h < 2; h++) {
    for (int i = 0; i < 32; i++) {
      file.left[i] = (u16)(a[i] >> (16 * h));
      file.right[i] = (u16)(b[i] >> (16 * h));
    }
    ((Handler)(void*)in.immediate)(view, half, ~0u);
    results[h] = file.result[0];
  }
  *destination<u32>(w, in.operand[0]) = (before & ~m) | (results[0] & m);
  u32* second = destination<u32>(w, in.operand[3]);
  *second = (*second & ~m) | (results[1] & m);
}
