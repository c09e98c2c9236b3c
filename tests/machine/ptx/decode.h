// Statements to instructions: one function per family of opcodes; what only computes is looked up in
// OPERATIONS.
#pragma once

using Decoder = void (Parser::*)();
static const std::map<std::string, Decoder> DECODERS = {{"ret", &Parser::decode_exit},
                                                        {"exit", &Parser::decode_exit},
                                                        {"trap", &Parser::decode_trap},
                                                        {"brkpt", &Parser::decode_trap},
                                                        {"bra", &Parser::decode_branch},
                                                        {"bar", &Parser::decode_barrier},
                                                        {"barrier", &Parser::decode_barrier},
                                                        {"membar", &Parser::decode_fence},
                                                        {"fence", &Parser::decode_fence},
                                                        {"nanosleep", &Parser::decode_hint},
                                                        {"prefetch", &Parser::decode_hint},
                                                        {"prefetchu", &Parser::decode_hint},
                                                        {"discard", &Parser::decode_hint},
                                                        {"applypriority", &Parser::decode_hint},
                                                        {"createpolicy", &Parser::decode_hint},
                                                        {"griddepcontrol", &Parser::decode_hint},
                                                        {"ld", &Parser::decode_load},
                                                        {"ldu", &Parser::decode_load},
                                                        {"st", &Parser::decode_store},
                                                        {"atom", &Parser::decode_atomic},
                                                        {"red", &Parser::decode_atomic},
                                                        {"cp", &Parser::decode_async_copy},
                                                        {"ldmatrix", &Parser::decode_load_matrix},
                                                        {"mma", &Parser::decode_matrix_product},
                                                        {"stmatrix", &Parser::decode_store_matrix},
                                                        {"wgmma", &Parser::decode_group_product},
                                                        {"shfl", &Parser::decode_shuffle},
                                                        {"vote", &Parser::decode_vote},
                                                        {"activemask", &Parser::decode_active_mask},
                                                        {"match", &Parser::decode_match},
                                                        {"redux", &Parser::decode_reduction},
                                                        {"cvt", &Parser::decode_conversion},
                                                        {"setp", &Parser::decode_compare}};

void Parser::decode(std::string text) {
  statement = trim(text);
  if (statement.empty()) return;
  touched.clear();
  in = Instruction();
  for (auto& x : in.operand) x = NO_REGISTER;
  if (statement[0] == '@') {
    size_t end = statement.find_first_of(" \t\n");
    std::string guard = statement.substr(1, end - 1);
    if (guard[0] == '!') in.guard_negated = true, guard = guard.substr(1);
    int width;
    if (!reg(guard, in.guard, width) || width) die("guard " + guard);
    statement = trim(statement.substr(end));
  }
  size_t end = statement.find_first_of(" \t\n");
  op = statement.substr(0, end);
  rest = end == std::string::npos ? "" : trim(statement.substr(end));
  for (auto& c : rest)
    if (c == '\n' || c == '\t') c = ' ';
  parts = split(op, '.');
  ops = operands(rest);
  last = TYPES.count(parts.back()) ? TYPES[parts.back()] : TYPE_NONE;
  kernel->opcodes[op]++;

  if (parts[0] == "mov" && ops.size() == 2) {
    if (ops[0][0] == '{' || ops[1][0] == '{') return decode_vector_move();
    if (ops[1].rfind("%clock", 0) == 0 || ops[1] == "%globaltimer") return decode_clock();
  }
  auto decoder = DECODERS.find(parts[0]);
  if (decoder != DECODERS.end()) return (this->*decoder->second)();
  decode_plain();
}

void Parser::decode_exit() {
  in.kind = KIND_EXIT;
  in.op_class = CLASS_BRANCH;
  in.handler = do_nothing;
  return emit();
}

void Parser::decode_trap() {
  in.kind = KIND_TRAP;
  in.op_class = CLASS_OTHER;
  in.handler = do_nothing;
  return emit();
}

void Parser::decode_branch() {
  need(1);
  in.kind = KIND_BRANCH;
  in.op_class = CLASS_BRANCH;
  in.handler = do_nothing;
  fixups.push_back({(int)kernel->code.size(), ops[0]});
  return emit();
}

void Parser::decode_barrier() {
  if (has("warp")) {
    need(1);
    in.kind = KIND_WARP_SYNC;
    in.op_class = CLASS_BARRIER;
    in.handler = do_nothing;
    u64 v;
    in.immediate = number(ops[0], v) ? (s64)(u32)v : -1;
    in.flag = 1;
    return emit();
  }
  if (!has("sync")) die("unsupported " + op);
  in.kind = KIND_BARRIER;
  in.op_class = CLASS_BARRIER;
  in.handler = do_nothing;
  u64 v = 0;
  if (ops.size() && !number(ops[0], v)) die("barrier number " + rest);
  in.variant = (u8)v;
  in.immediate = 0;
  if (ops.size() > 1) {
    if (!number(ops[1], v)) die("barrier count");
    in.immediate = (s64)v;
  }
  return emit();
}

void Parser::decode_fence() {
  in.op_class = CLASS_BARRIER;
  in.handler = fence;
  in.scope = has("cta") ? 0 : has("sys") ? 2 : 1;
  if (parts[0] == "fence" && has("proxy")) in.handler = do_nothing;
  return emit();
}

void Parser::decode_hint() {
  in.handler = do_nothing;
  in.op_class = CLASS_OTHER;
  return emit();
}

void Parser::decode_load() {
  need(2);
  std::string space;
  u8 type;
  int vector;
  memory_flags(space, type, vector);
  in.vector = vector;
  in.element_bytes = bytes_of(type);
  in.sign_extend = is_signed(type);
  auto d = vec(ops[0]);
  if ((int)d.size() != vector) die("vector size " + statement);
  int w = 0;
  for (int i = 0; i < vector; i++) {
    int g = 0;
    in.operand[i] = operand(d[i], -1, true, &g);
    if (in.operand[i] != NO_REGISTER) w = g;
  }
  in.register_bytes = w ? w : in.element_bytes;
  if (in.register_bytes < in.element_bytes) die("narrow destination " + statement);
  if (space == "param") {
    std::string nm;
    s64 off;
    u8 ww;
    s32 ba;
    address(ops[1], ba, off, ww, &nm);
    auto q = parameters.find(nm);
    if (q == parameters.end()) die("parameter " + nm);
    in.immediate = q->second + off;
    in.op_class = CLASS_PARAMETER;
    in.handler = load_parameter;
    return emit();
  }
  address(ops[1], in.base, in.immediate, in.source_bytes);
  if (space == "global" || space == "const") {
    in.op_class = CLASS_LOAD_GLOBAL;
    in.handler = load_global;
  } else if (space == "shared") {
    in.op_class = CLASS_LOAD_SHARED;
    in.handler = load_shared;
  } else
    die("state space of " + statement);
  return emit();
}

void Parser::decode_store() {
  need(2);
  std::string space;
  u8 type;
  int vector;
  memory_flags(space, type, vector);
  in.vector = vector;
  in.element_bytes = bytes_of(type);
  auto d = vec(ops[1]);
  if ((int)d.size() != vector) die("vector size " + statement);
  int w = 0;
  for (int i = 0; i < vector; i++) {
    s32 o;
    int g;
    if (reg(d[i], o, g)) w = g;
  }
  if (!w) w = in.element_bytes < 2 ? 2 : in.element_bytes;
  in.register_bytes = w;
  for (int i = 0; i < vector; i++) in.operand[i] = operand(d[i], w);
  address(ops[0], in.base, in.immediate, in.source_bytes);
  if (space == "global") {
    in.op_class = CLASS_STORE_GLOBAL;
    in.handler = store_global;
  } else if (space == "shared") {
    in.op_class = CLASS_STORE_SHARED;
    in.handler = store_shared;
  } else
    die("state space of " + statement);
  return emit();
}

void Parser::decode_atomic() {
  std::string space;
  u8 type = TYPE_NONE;
  in.scope = 1;
  in.order = ORDER_RELAXED;
  int atomic_result = -1;
  static std::map<std::string, int> an = {{"add", A_ADD}, {"min", A_MIN}, {"max", A_MAX},   {"and", A_AND},
                                          {"or", A_OR},   {"xor", A_XOR}, {"exch", A_EXCH}, {"cas", A_CAS},
                                          {"inc", A_INC}, {"dec", A_DEC}};
  for (size_t i = 1; i < parts.size(); i++) {
    auto& x = parts[i];
    if (x == "global" || x == "shared")
      space = x;
    else if (x == "acquire")
      in.order |= ORDER_ACQUIRE;
    else if (x == "release")
      in.order |= ORDER_RELEASE;
    else if (x == "acq_rel")
      in.order |= ORDER_ACQUIRE | ORDER_RELEASE;
    else if (x == "relaxed" || x == "noftz") {
    } else if (x == "cta")
      in.scope = 0;
    else if (x == "gpu")
      in.scope = 1;
    else if (x == "sys")
      in.scope = 2;
    else if (an.count(x))
      atomic_result = an[x];
    else if (TYPES.count(x))
      type = TYPES[x];
    else
      die("modifier " + x + " of " + op);
  }
  if (atomic_result < 0 || type == TYPE_NONE) die(op);
  in.variant = atomic_result;
  in.type = type;
  in.element_bytes = bytes_of(type);
  in.register_bytes = in.element_bytes;
  size_t k = 0;
  if (parts[0] == "atom") in.operand[0] = operand(ops[k++], in.element_bytes, true);
  address(ops[k++], in.base, in.immediate, in.source_bytes);
  in.operand[1] = operand(ops[k++], in.element_bytes);
  if (atomic_result == A_CAS) in.operand[2] = operand(ops[k++], in.element_bytes);
  in.op_class = CLASS_ATOMIC;
  in.handler = space == "shared" ? atomic_shared : atomic_global;
  return emit();
}

void Parser::decode_async_copy() {
  if (!has("async")) die(op);
  in.op_class = CLASS_ASYNC_COPY;
  if (has("commit_group")) {
    in.handler = commit_copies;
    return emit();
  }
  if (has("wait_group")) {
    u64 v = 0;
    number(ops[0], v);
    in.immediate = (s64)v;
    in.handler = wait_for_copies;
    return emit();
  }
  if (has("wait_all")) {
    in.immediate = 0;
    in.flag = 1;
    in.handler = wait_for_copies;
    return emit();
  }
  if (has("mbarrier") || has("bulk")) die(op);
  need(3);
  u64 v;
  if (!number(ops[2], v)) die("cp-size");
  in.vector = (u8)v;
  in.element_bytes = 1;
  if (has("cg")) in.order |= CACHE_GLOBAL;
  address(ops[0], in.base, in.immediate, in.source_bytes);
  s32 gb;
  s64 go;
  u8 gw;
  address(ops[1], gb, go, gw);
  if (gb == NO_REGISTER || gw != 8) die("cp.async source");
  in.operand[0] = gb;
  in.target = (s32)go;
  if (ops.size() > 3) in.operand[1] = operand(ops[3], 4);
  in.handler = copy_async;
  return emit();
}

void Parser::decode_load_matrix() {
  u8 vector = has("x4") ? 4 : has("x2") ? 2 : 1;
  in.vector = vector;
  in.flag = has("trans");
  if (!has("m8n8") || !has("b16")) die(op);
  auto d = vec(ops[0]);
  for (int i = 0; i < vector; i++) in.operand[i] = operand(d[i], 4, true);
  address(ops[1], in.base, in.immediate, in.source_bytes);
  in.kind = KIND_WARP_SYNC;
  in.immediate = in.immediate;
  in.op_class = CLASS_LOAD_MATRIX;
  in.handler = load_matrix;
  in.target = -1;
  return emit();
}

void Parser::decode_store_matrix() {
  in.vector = has("x4") ? 4 : has("x2") ? 2 : 1;
  in.flag = has("trans");
  if (!has("m8n8") || !has("b16")) die(op);
  auto values = vec(ops[1]);
  for (int i = 0; i < in.vector; i++) in.operand[i] = operand(values[i], 4);
  address(ops[0], in.base, in.immediate, in.source_bytes);
  in.kind = KIND_WARP_SYNC;
  in.op_class = CLASS_STORE_SHARED;
  in.handler = store_matrix;
  in.target = -1;
  return emit();
}

// wgmma.mma_async.sync.aligned.m64nNk16.f32.T.T {d}, {a} or descriptor, descriptor, counts, 1, 1 (, A across),
// B across; and wgmma.fence, .commit_group, .wait_group, which have nothing to do where products are made when
// they are issued.
void Parser::decode_group_product() {
  in.op_class = CLASS_MATRIX;
  in.handler = do_nothing;
  if (!has("mma_async")) return emit();
  std::string shape;
  for (auto& x : parts)
    if (x.rfind("m64n", 0) == 0) shape = x;
  size_t k = shape.find('k');
  bool sixteen = last == TYPE_BF16 || last == TYPE_F16;
  if (k == std::string::npos || shape.substr(k) != "k16" || !sixteen || !has("f32")) die("unsupported " + op);
  in.vector = (u8)atoi(shape.c_str() + 4);
  in.type = last;
  for (auto& x : vec(ops[0])) {
    in.accumulators.push_back(operand(x, 4, true));
    touched.push_back({in.accumulators.back(), false});
  }
  auto left = vec(ops[1]);
  bool described = ops[1][0] != '{';
  need(described ? 8 : 7);
  if (described)
    in.operand[0] = operand(ops[1], 8);
  else
    for (int i = 0; i < 4; i++) in.operand[i] = operand(left[i], 4);
  in.operand[4] = operand(ops[2], 8);
  in.operand[5] = operand(ops[3], 0);
  u64 scale_a, scale_b, across[2] = {0, 0};
  bool numbers = number(ops[4], scale_a) && number(ops[5], scale_b);
  for (int i = described ? 0 : 1; i < 2; i++) numbers &= number(ops[described ? 6 + i : 6], across[i]);
  if (!numbers || scale_a != 1 || scale_b != 1) die("operands of " + statement);
  in.flag = described | (across[0] ? 2 : 0) | (across[1] ? 4 : 0);
  in.kind = KIND_WARP_SYNC;
  in.target = -1;
  in.handler = multiply_in_group;
  return emit();
}

void Parser::decode_matrix_product() {
  auto d = vec(ops[0]), a = vec(ops[1]), bb = vec(ops[2]), c = vec(ops[3]);
  int w = 4;
  if (has("m16n8k16"))
    in.variant = MMA_16816;
  else if (has("m16n8k8"))
    in.variant = has("tf32") ? MMA_1688TF : MMA_1688;
  else if (has("m16n8k4"))
    in.variant = MMA_1684TF;
  else if (has("m16n8k32"))
    in.variant = MMA_16832;
  else if (has("m8n8k4") && has("f64")) {
    in.variant = MMA_884;
    w = 8;
  } else
    die(op);
  std::vector<u8> ts;
  for (auto& x : parts)
    if (TYPES.count(x)) ts.push_back(TYPES[x]);
  if (ts.size() != 4) die(op);
  in.source_type = ts[0];
  in.type = ts[1];
  if (!has("row") || !has("col")) die(op);
  for (size_t i = 0; i < d.size(); i++) in.operand[i] = operand(d[i], w, true);
  for (size_t i = 0; i < a.size(); i++) in.operand[4 + i] = operand(a[i], w);
  for (size_t i = 0; i < bb.size(); i++) in.operand[8 + i] = operand(bb[i], w);
  for (size_t i = 0; i < c.size(); i++) in.operand[12 + i] = operand(c[i], w);
  in.kind = KIND_WARP_SYNC;
  in.op_class = CLASS_MATRIX;
  in.handler = multiply_matrices;
  return emit();
}

void Parser::decode_shuffle() {
  need(5);
  std::string d = ops[0], pd;
  size_t bar = d.find('|');
  if (bar != std::string::npos) {
    pd = trim(d.substr(bar + 1));
    d = trim(d.substr(0, bar));
  }
  in.operand[0] = operand(d, 4, true);
  if (pd.size()) in.operand[5] = operand(pd, 0, true);
  in.operand[1] = operand(ops[1], 4);
  in.operand[2] = operand(ops[2], 4);
  in.operand[3] = operand(ops[3], 4);
  u64 v, c;
  in.variant = has("up") ? 0 : has("down") ? 1 : has("bfly") ? 2 : 3;
  in.handler = shuffle;
  in.kind = KIND_WARP_SYNC;
  in.op_class = CLASS_SHUFFLE;
  in.flag = 0;
  in.target = number(ops[4], v) ? (s32)(u32)v : 0;
  if (!number(ops[4], v)) in.flag = 8;
  if (in.variant == 2 && pd.empty() && number(ops[2], v) && number(ops[3], c) && c == 31 && v < 32) {
    in.handler = shuffle_butterfly;
    in.immediate = (s64)v;
  }
  return emit();
}

void Parser::decode_vote() {
  in.variant = has("all") ? 0 : has("any") ? 1 : has("uni") ? 2 : 3;
  in.operand[0] = operand(ops[0], in.variant == 3 ? 4 : 0, true);
  std::string a = ops[1];
  if (a[0] == '!') in.flag = 1, a = a.substr(1);
  in.operand[1] = operand(a, 0);
  in.kind = KIND_WARP_SYNC;
  in.op_class = CLASS_SHUFFLE;
  in.handler = vote;
  u64 v;
  in.target = ops.size() > 2 && number(ops[2], v) ? (s32)(u32)v : -1;
  return emit();
}

void Parser::decode_active_mask() {
  in.operand[0] = operand(ops[0], 4, true);
  in.handler = active_mask;
  in.op_class = CLASS_SHUFFLE;
  return emit();
}

void Parser::decode_match() {
  in.register_bytes = bytes_of(last);
  in.flag = has("all");
  std::string d = ops[0];
  in.operand[0] = operand(d, 4, true);
  in.operand[1] = operand(ops[1], in.register_bytes);
  in.kind = KIND_WARP_SYNC;
  in.op_class = CLASS_SHUFFLE;
  in.handler = match_lanes;
  u64 v;
  in.target = number(ops[2], v) ? (s32)(u32)v : -1;
  return emit();
}

void Parser::decode_reduction() {
  static std::map<std::string, int> an = {{"add", A_ADD}, {"min", A_MIN}, {"max", A_MAX},
                                          {"and", A_AND}, {"or", A_OR},   {"xor", A_XOR}};
  in.variant = an.at(parts[2]);
  in.type = last;
  in.operand[0] = operand(ops[0], 4, true);
  in.operand[1] = operand(ops[1], 4);
  in.kind = KIND_WARP_SYNC;
  in.op_class = CLASS_SHUFFLE;
  in.handler = reduce_warp;
  u64 v;
  in.target = ops.size() > 2 && number(ops[2], v) ? (s32)(u32)v : -1;
  if (ops.size() > 2 && !number(ops[2], v)) in.target = -1;
  return emit();
}

void Parser::decode_conversion() {
  need(2);
  in.op_class = CLASS_CONVERT;
  if (parts.back() == "e4m3x2" || parts.back() == "e5m2x2") {
    if (!has("f16x2") || has("relu")) die("unsupported " + op);
    in.flag = has("e5m2x2");
    in.operand[0] = operand(ops[0], 4, true);
    in.operand[1] = operand(ops[1], 2);
    in.handler = widen_fp8_pair;
    return emit();
  }
  if (has("e4m3x2") || has("e5m2x2")) {
    if (parts.back() != "f32" || has("relu")) die("unsupported " + op);
    need(3);
    in.flag = has("e5m2x2");
    in.operand[0] = operand(ops[0], 2, true);
    in.operand[1] = operand(ops[1], 4);
    in.operand[2] = operand(ops[2], 4);
    in.handler = narrow_to_fp8_pair;
    return emit();
  }
  u8 td = TYPES.count(parts[parts.size() - 2]) ? TYPES[parts[parts.size() - 2]] : TYPE_NONE;
  u8 ts = last;
  for (auto& x : parts) {
    if (x == "rn")
      in.rounding = R_RN;
    else if (x == "rz")
      in.rounding = R_RZ;
    else if (x == "rni")
      in.rounding = R_RNI;
    else if (x == "rzi")
      in.rounding = R_RZI;
    else if (x == "rmi")
      in.rounding = R_RMI;
    else if (x == "rpi")
      in.rounding = R_RPI;
    else if (x == "rna")
      in.rounding = R_RNA;
    else if (x == "ftz")
      in.flag |= 1;
    else if (x == "sat")
      in.flag |= 2;
    else if (x == "relu")
      in.flag |= 4;
    else if (x == "rm" || x == "rp")
      die("unsupported " + op);
  }
  in.type = td;
  in.source_type = ts;
  if (td == TYPE_NONE || ts == TYPE_NONE) die(op);
  if (td == TYPE_F16X2 || td == TYPE_BF16X2) {
    need(3);
    in.operand[0] = operand(ops[0], 4, true);
    in.operand[1] = operand(ops[1], 4);
    in.operand[2] = operand(ops[2], 4);
    in.handler = convert_pair;
    return emit();
  }
  int wd = 0, wsrc = 0;
  in.operand[0] = operand(ops[0], -1, true, &wd);
  {
    s32 o;
    int g;
    if (reg(trim(ops[1]), o, g)) {
      in.operand[1] = o;
      wsrc = g;
    } else
      in.operand[1] = operand(ops[1], wsrc = std::max(2, bytes_of(ts)), false, &wsrc);
  }
  in.register_bytes = wd;
  in.source_bytes = wsrc;
  in.handler = convert;
  auto q = COMMON_CONVERSIONS.find(op + ":" + std::to_string(wd) + std::to_string(wsrc));
  if (q != COMMON_CONVERSIONS.end()) in.handler = q->second;
  return emit();
}

void Parser::decode_vector_move() {
  bool unary = ops[0][0] == '{';
  auto v = vec(unary ? ops[0] : ops[1]);
  int W = bytes_of(last);
  in.vector = (u8)v.size();
  in.element_bytes = (u8)(W / v.size());
  in.source_bytes = (u8)W;
  in.op_class = CLASS_MOVE;
  int g = 0;
  s32 o;
  for (auto& x : v)
    if (reg(x, o, g)) break;
  in.register_bytes = g ? g : in.element_bytes;
  if (unary) {
    in.operand[0] = operand(ops[1], W);
    for (size_t i = 0; i < v.size(); i++) in.operand[1 + i] = operand(v[i], in.register_bytes, true);
    in.handler = unpack_registers;
  } else {
    in.operand[0] = operand(ops[0], W, true);
    for (size_t i = 0; i < v.size(); i++) in.operand[1 + i] = operand(v[i], in.register_bytes);
    in.handler = pack_registers;
  }
  return emit();
}

void Parser::decode_clock() {
  int g;
  in.operand[0] = operand(ops[0], -1, true, &g);
  in.register_bytes = g;
  in.handler = read_clock;
  in.op_class = CLASS_OTHER;
  return emit();
}

void Parser::decode_compare() {
  // setp.cmp[.bool][.ftz].type
  std::string bo;
  std::vector<std::string> k;
  for (auto& x : parts) {
    if (x == "ftz") continue;
    if (x == "and" || x == "or" || x == "xor") {
      bo = x;
      continue;
    }
    k.push_back(x);
  }
  std::string key;
  for (auto& x : k) key += (key.empty() ? "" : ".") + x;
  size_t bar = ops[0].find('|');
  if (bar != std::string::npos && key.size() > 2 && key.substr(key.size() - 2) == "x2" && bo.empty()) {
    auto scalar = OPERATIONS.find(key.substr(0, key.size() - 2));
    if (scalar == OPERATIONS.end()) die("unsupported " + op);
    in.operand[0] = operand(ops[0].substr(0, bar), 0, true);
    in.operand[3] = operand(ops[0].substr(bar + 1), 0, true);
    in.operand[1] = operand(ops[1], 4);
    in.operand[2] = operand(ops[2], 4);
    in.immediate = (s64)(void*)scalar->second.handler;
    in.op_class = CLASS_PREDICATE;
    in.handler = compare_pair;
    return emit();
  }
  auto it = OPERATIONS.find(key);
  if (it == OPERATIONS.end()) die("unsupported " + op);
  if (bar != std::string::npos) die("two predicates " + statement);
  int w = it->second.w[1] - '0';
  in.operand[0] = operand(ops[0], 0, true);
  in.operand[1] = operand(ops[1], w);
  in.operand[2] = operand(ops[2], w);
  in.op_class = CLASS_PREDICATE;
  in.handler = it->second.handler;
  if (bo.size()) {
    std::string c = ops[3];
    if (c[0] == '!') in.flag = 1, c = trim(c.substr(1));
    in.operand[3] = operand(c, 0);
    in.variant = bo == "and" ? 0 : bo == "or" ? 1 : 2;
    in.immediate = (s64)(void*)in.handler;
    in.handler = compare_and_combine;
  }
  return emit();
}

void Parser::decode_plain() {
  auto it = OPERATIONS.find(op);
  if (it == OPERATIONS.end()) die("unsupported instruction " + op + "  (" + statement + ")");
  const char* w = it->second.w;
  size_t nw = strlen(w);
  if (ops.size() != nw) die("operand count of " + statement);
  for (size_t i = 0; i < nw; i++) {
    int width = w[i] == 'p' ? 0 : w[i] - '0';
    in.operand[i] = operand(ops[i], width, i == 0);
  }
  in.handler = it->second.handler;
  in.op_class = it->second.op_class;
  return emit();
}
