// Statements -> instructions: one function per family of opcodes. What only computes is looked up in table.h.
#include <algorithm>
#include "parse.h"
#include "table.h"

namespace machine {

const std::map<std::string, Parser::Decoder>& Parser::decoders() {
  static const std::map<std::string, Decoder> decoders = {
    {"ret", &Parser::exit}, {"exit", &Parser::exit}, {"trap", &Parser::trap}, {"brkpt", &Parser::trap},
    {"bra", &Parser::branch}, {"bar", &Parser::barrier}, {"barrier", &Parser::barrier}, {"membar", &Parser::fence},
    {"fence", &Parser::fence}, {"nanosleep", &Parser::hint}, {"prefetch", &Parser::hint},
    {"prefetchu", &Parser::hint}, {"discard", &Parser::hint}, {"applypriority", &Parser::hint},
    {"createpolicy", &Parser::hint}, {"griddepcontrol", &Parser::hint}, {"ld", &Parser::load}, {"ldu", &Parser::load},
    {"st", &Parser::store}, {"atom", &Parser::atomic}, {"red", &Parser::atomic}, {"cp", &Parser::async_copy},
    {"ldmatrix", &Parser::load_matrix}, {"stmatrix", &Parser::store_matrix}, {"mma", &Parser::matrix},
    {"wgmma", &Parser::group_matrix}, {"shfl", &Parser::shuffle}, {"vote", &Parser::vote},
    {"activemask", &Parser::active_mask}, {"match", &Parser::match}, {"redux", &Parser::reduce},
    {"cvt", &Parser::convert}, {"mov", &Parser::move}, {"setp", &Parser::compare},
  };
  return decoders;
}

void Parser::statement(const std::string& whole) {
  std::string rest = whole;
  std::replace_if(rest.begin(), rest.end(), [](char c) { return isspace(c); }, ' ');
  if (rest.empty()) return;
  touched.clear();
  Instruction in;
  if (rest[0] == '@') guard(rest, in);
  size_t end = rest.find(' ');
  opcode = rest.substr(0, end);
  parts = split(opcode, '.');
  operands = parts_of(end == std::string::npos ? "" : rest.substr(end));
  kernel->opcodes[opcode]++;
  auto decoder = decoders().find(parts[0]);
  if (decoder != decoders().end()) (this->*decoder->second)(in); else plain(in);
  emit(in);
}

void Parser::guard(std::string& statement, Instruction& in) {
  size_t end = statement.find(' ');
  in.guard_negated = statement[1] == '!';
  in.guard = source(statement.substr(in.guard_negated ? 2 : 1, end - (in.guard_negated ? 2 : 1)), 0);
  statement = trimmed(statement.substr(end));
}

void Parser::emit(Instruction& in) {
  in.index = (s32)kernel->code.size();
  in.line = statement_line;
  in.source = location;
  kernel->code.push_back(in);
  touches.push_back(touched);
}

bool Parser::has(const char* part) const { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

void Parser::need(size_t count) {
  if (operands.size() < count) die("too few operands of " + opcode);
}

u64 Parser::number(const std::string& text) {
  u64 value;
  if (!parse_number(text, value)) die("expected a number in " + opcode + ", got " + text);
  return value;
}

// The operand that names the lanes which take part, if it is there.
void Parser::collective(Instruction& in, Class counted, size_t mask_operand) {
  in.kind = Kind::collective;
  in.counted = counted;
  if (mask_operand >= operands.size()) return;
  u64 members;
  if (parse_number(operands[mask_operand], members)) in.members = (u32)members;
  else in.member_mask = source(operands[mask_operand], 4);
}

// --- control ---------------------------------------------------------------------------------------------------------

void Parser::exit(Instruction& in) { in.kind = Kind::exit; in.counted = Class::branch; }

void Parser::trap(Instruction& in) { in.kind = Kind::trap; }

void Parser::branch(Instruction& in) {
  need(1);
  in.kind = Kind::branch;
  in.counted = Class::branch;
  jumps.push_back({(int)kernel->code.size(), operands[0]});
}

void Parser::barrier(Instruction& in) {
  if (has("warp")) {
    need(1);
    in.execute = warp_barrier;
    return collective(in, Class::barrier, 0);
  }
  if (!has("sync")) die("unsupported instruction " + opcode);
  in.kind = Kind::barrier;
  in.counted = Class::barrier;
  in.variant = operands.empty() ? 0 : (u8)number(operands[0]);
  in.immediate = operands.size() > 1 ? (s64)number(operands[1]) : 0;  // threads; 0: all of the program
  if (in.variant >= 16) die("barrier " + operands[0]);
}

void Parser::fence(Instruction& in) {
  in.counted = Class::barrier;
  in.scope = has("cta") ? Scope::block : has("sys") ? Scope::system : Scope::device;
  in.execute = has("proxy") ? proxy_fence : machine::fence;
}

void Parser::hint(Instruction& in) { in.execute = nothing; }

// --- memory ----------------------------------------------------------------------------------------------------------

// Modifiers of a memory instruction but its operation; returns the state space.
std::string Parser::memory_modifiers(Instruction& in, bool atomic) {
  static const std::map<std::string, int> orders = {
    {"relaxed", RELAXED}, {"acquire", ACQUIRE}, {"release", RELEASE}, {"acq_rel", ACQUIRE | RELEASE},
    {"volatile", VOLATILE}, {"cg", PAST_L1}, {"cv", PAST_L1},
  };
  static const std::map<std::string, Scope> scopes = {
      {"cta", Scope::block}, {"gpu", Scope::device}, {"sys", Scope::system}};
  static const std::map<std::string, Atomic> atomics = {
    {"add", Atomic::add}, {"min", Atomic::min}, {"max", Atomic::max}, {"and", Atomic::bit_and}, {"or", Atomic::bit_or},
    {"xor", Atomic::bit_xor}, {"exch", Atomic::exchange}, {"cas", Atomic::compare_and_swap}, {"inc", Atomic::increment},
    {"dec", Atomic::decrement},
  };
  static const std::vector<std::string> ignored = {"sync", "weak", "nc", "ca",    "wb",
                                                   "cs",   "wt",   "lu", "noftz", "unified"};
  std::string space;
  bool operation = false;
  in.order = atomic ? RELAXED : 0;
  in.scope = atomic ? Scope::device : Scope::system;
  for (size_t i = 1; i < parts.size(); i++) {
    const std::string& part = parts[i];
    if (part == "global" || part == "shared" || part == "param" || part == "local" || part == "const") space = part;
    else if (part == "shared::cta") space = "shared";
    else if (!atomic && (part == "v2" || part == "v4" || part == "v8")) in.elements = (u8)(part[1] - '0');
    else if (orders.count(part)) in.order |= orders.at(part);
    else if (scopes.count(part)) in.scope = scopes.at(part);
    else if (atomic && atomics.count(part)) { in.variant = (u8)atomics.at(part); operation = true; }
    else if (type_named(part) != Type::none) in.type = type_named(part);
    else if (std::find(ignored.begin(), ignored.end(), part) == ignored.end() && part.rfind("L1::", 0) &&
             part.rfind("L2::", 0)) {
      die("modifier " + part + " of " + opcode);
    }
  }
  if (in.type == Type::none || (atomic && !operation)) die("unsupported instruction " + opcode);
  in.element_bytes = in.register_bytes = bytes_of(in.type);
  return space;
}

void Parser::load(Instruction& in) {
  need(2);
  std::string space = memory_modifiers(in, false);
  in.sign_extend = is_signed(in.type);
  auto names = vector_parts(operands[0]);
  if (names.size() != in.elements) die("number of registers of " + opcode);
  for (size_t i = 0; i < names.size(); i++) {
    int width = in.register_bytes;
    in.operands[i] = any_destination(names[i], width);
    in.register_bytes = (u8)width;
  }
  if (in.register_bytes < in.element_bytes) die("a destination of " + opcode + " is too narrow");
  if (space == "param") {
    std::string name;
    split_offset(trimmed(operands[1].substr(1, operands[1].size() - 2)), name, in.offset);
    if (!parameters.count(name)) die("parameter " + name);
    in.offset += parameters[name];
    in.counted = Class::parameter;
    in.execute = load_parameter;
    return;
  }
  address(operands[1], in);
  if (space == "global" || space == "const") { in.counted = Class::load_global; in.execute = load_global; }
  else if (space == "shared") { in.counted = Class::load_shared; in.execute = load_shared; }
  else if (space == "local") { in.counted = Class::local; in.execute = load_local; }
  else die("unsupported state space: " + opcode);
}

void Parser::store(Instruction& in) {
  need(2);
  std::string space = memory_modifiers(in, false);
  auto names = vector_parts(operands[1]);
  if (names.size() != in.elements) die("number of registers of " + opcode);
  int width = std::max(2, bytes_of(in.type));
  Operand where;
  for (const std::string& name : names) find_register(name, where, width);
  in.register_bytes = (u8)width;
  for (size_t i = 0; i < names.size(); i++) in.operands[i] = source(names[i], width);
  address(operands[0], in);
  if (space == "global") { in.counted = Class::store_global; in.execute = store_global; }
  else if (space == "shared") { in.counted = Class::store_shared; in.execute = store_shared; }
  else if (space == "local") { in.counted = Class::local; in.execute = store_local; }
  else die("unsupported state space: " + opcode);
}

void Parser::atomic(Instruction& in) {
  std::string space = memory_modifiers(in, true);
  size_t next = 0;
  bool returns = parts[0] == "atom", swaps = in.variant == (u8)Atomic::compare_and_swap;
  need(2 + returns + swaps);
  int width = in.register_bytes;
  if (returns) in.operands[0] = destination(operands[next++], width);
  address(operands[next++], in);
  in.operands[1] = source(operands[next++], width);
  if (swaps) in.operands[2] = source(operands[next++], width);
  in.counted = Class::atomic;
  if (space != "global" && space != "shared") die("unsupported state space: " + opcode);
  in.execute = space == "shared" ? atomic_shared : atomic_global;
}

void Parser::async_copy(Instruction& in) {
  in.counted = Class::async_copy;
  if (!has("async") || has("mbarrier") || has("bulk")) die("unsupported instruction " + opcode);
  if (has("commit_group")) { in.execute = commit_copies; return; }
  if (has("wait_group") || has("wait_all")) {
    in.execute = wait_copies;
    if (has("wait_all")) in.modifiers |= ALL; else in.immediate = (s64)number(operands.at(0));
    return;
  }
  need(3);
  in.execute = copy_async;
  in.elements = (u8)number(operands[2]);
  in.element_bytes = 1;
  if (has("cg")) in.order |= PAST_L1;
  address(operands[0], in);
  u8 width;
  address(operands[1], in.operands[0], in.immediate, width);
  if (in.operands[0] == ABSENT || width != 8) die("source of " + opcode);
  if (operands.size() > 3) in.operands[1] = source(operands[3], 4);  // bytes to read; the rest is zero
}

// --- matrices --------------------------------------------------------------------------------------------------------

void Parser::sources(Instruction& in, const std::string& list, int width, int first) {
  for (const std::string& name : vector_parts(list)) in.operands[first++] = source(name, width);
}

static int matrices(const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    if (part == "x2" || part == "x4") return part[1] - '0';
  }
  return 1;
}

void Parser::load_matrix(Instruction& in) {
  if (!has("m8n8") || !has("b16")) die("unsupported instruction " + opcode);
  need(2);
  in.execute = machine::load_matrix;
  in.elements = (u8)matrices(parts);
  if (has("trans")) in.modifiers |= TRANSPOSED;
  auto names = vector_parts(operands[0]);
  for (int i = 0; i < in.elements; i++) in.operands[i] = destination(names.at(i), 4);
  address(operands[1], in);
  collective(in, Class::load_matrix, 2);
}

void Parser::store_matrix(Instruction& in) {
  if (!has("m8n8") || !has("b16")) die("unsupported instruction " + opcode);
  need(2);
  in.execute = machine::store_matrix;
  in.elements = (u8)matrices(parts);
  if (has("trans")) in.modifiers |= TRANSPOSED;
  address(operands[0], in);
  sources(in, operands[1], 4, 0);
  collective(in, Class::load_matrix, 2);
}

// mma.sync.aligned.m16n8kK.row.col.D.A.B.C d, a, b, c: operands 0.. d, 4.. a, 8.. b, 12.. c
void Parser::matrix(Instruction& in) {
  need(4);
  std::vector<Type> types;
  for (const std::string& part : parts) {
    if (type_named(part) != Type::none) types.push_back(type_named(part));
  }
  std::string shape = parts.size() > 3 ? parts[3] : "";
  if (types.size() != 4 || !has("row") || !has("col") || shape.rfind("m16n8k", 0))
    die("unsupported instruction " + opcode);
  if (types[1] != types[2]) die("unsupported instruction " + opcode);
  in.execute = multiply_matrices;
  in.immediate = atoi(shape.c_str() + 6);
  in.type = types[0];
  in.source_type = types[1];
  in.elements = (u8)(in.immediate * bytes_of(types[1]) / 8);  // registers of a
  if (in.immediate > 32 || vector_parts(operands[1]).size() != in.elements) die("unsupported instruction " + opcode);
  int i = 0;
  for (const std::string& name : vector_parts(operands[0])) in.operands[i++] = destination(name, 4);
  sources(in, operands[1], 4, 4);
  sources(in, operands[2], 4, 8);
  sources(in, operands[3], 4, 12);
  collective(in, Class::matrix, 4);
}

// wgmma.mma_async.sync.aligned.m64nNkK.D.A.B d, a, b, scale-d, 1, 1 [, trans-a] [, trans-b]: d in
// Kernel::lists[target]; operands 0.. a (registers or a descriptor), 4 b's descriptor, 5 the predicate scale-d;
// variant: a is in registers.
void Parser::group_matrix(Instruction& in) {
  collective(in, Class::matrix, operands.size());
  if (has("fence")) { in.execute = nothing; return; }
  if (has("commit_group")) { in.execute = commit_group; return; }
  if (has("wait_group")) { in.execute = wait_group; in.immediate = (s64)number(operands.at(0)); return; }
  need(6);
  std::string shape = parts.size() > 7 ? parts[4] : "";
  if (!has("mma_async") || shape.rfind("m64n", 0)) die("unsupported instruction " + opcode);
  in.execute = multiply_group;
  in.type = type_named(parts[5]);
  in.source_type = type_named(parts[6]);
  in.immediate = atoi(shape.c_str() + 4);  // n; k is 32 bytes
  if (in.type != Type::f32 || type_named(parts[7]) != in.source_type) die("unsupported instruction " + opcode);
  std::vector<Operand> accumulators;
  for (const std::string& name : vector_parts(operands[0])) {
    source(name, 4);
    accumulators.push_back(destination(name, 4));
  }
  if ((s64)accumulators.size() != in.immediate / 2) die("accumulators of " + opcode);
  in.target = (s32)kernel->lists.size();
  kernel->lists.push_back(accumulators);
  in.variant = operands[1][0] == '{';
  sources(in, operands[1], in.variant ? 4 : 8, 0);
  in.operands[4] = source(operands[2], 8);
  in.operands[5] = source(operands[3], 0);
  if (number(operands[4]) != 1 || number(operands[5]) != 1) die("a negated operand of " + opcode);
  size_t next = 6;
  if (!in.variant && next < operands.size() && number(operands[next++])) in.modifiers |= TRANSPOSED_A;
  if (next < operands.size() && number(operands[next])) in.modifiers |= TRANSPOSED;
}

// --- collectives of a warp -------------------------------------------------------------------------------------------

static bool split_pair(const std::string& text, std::string& first, std::string& second) {
  size_t bar = text.find('|');
  first = trimmed(text.substr(0, bar));
  second = bar == std::string::npos ? "_" : trimmed(text.substr(bar + 1));
  return bar != std::string::npos;
}

void Parser::shuffle(Instruction& in) {
  need(5);
  std::string value, valid;
  bool tells = split_pair(operands[0], value, valid);
  in.operands[0] = destination(value, 4);
  for (int i = 1; i < 4; i++) in.operands[i] = source(operands[i], 4);
  if (tells) in.operands[4] = destination(valid, 0);
  in.variant = (u8)(has("up")   ? Shuffle::up :
                    has("down") ? Shuffle::down :
                    has("bfly") ? Shuffle::butterfly :
                                  Shuffle::index);
  in.execute = machine::shuffle;
  collective(in, Class::shuffle, 4);
  u64 distance, clamp;
  bool fixed = parse_number(operands[2], distance) && parse_number(operands[3], clamp);
  if (has("bfly") && !tells && fixed && clamp == 31 && distance < 32) {
    in.execute = butterfly;
    in.immediate = (s64)distance;
  }
}

void Parser::vote(Instruction& in) {
  need(2);
  in.variant = (u8)(has("all") ? Vote::all : has("any") ? Vote::any : has("uni") ? Vote::uniform : Vote::ballot);
  in.operands[0] = destination(operands[0], has("ballot") ? 4 : 0);
  in.operands[1] = predicate_source(operands[1], in);
  in.execute = machine::vote;
  collective(in, Class::shuffle, 2);
}

void Parser::active_mask(Instruction& in) {
  need(1);
  in.operands[0] = destination(operands[0], 4);
  in.execute = machine::active_mask;
  in.counted = Class::shuffle;
}

void Parser::match(Instruction& in) {
  need(3);
  in.register_bytes = (u8)bytes_of(last_type());
  if (has("all")) in.modifiers |= ALL;
  std::string mask, equal;
  bool tells = split_pair(operands[0], mask, equal);
  in.operands[0] = destination(mask, 4);
  if (tells) in.operands[2] = destination(equal, 0);
  in.operands[1] = source(operands[1], in.register_bytes);
  in.execute = machine::match;
  collective(in, Class::shuffle, 2);
}

void Parser::reduce(Instruction& in) {
  need(3);
  memory_modifiers(in, true);  // the same names of operations
  in.operands[0] = destination(operands[0], 4);
  in.operands[1] = source(operands[1], 4);
  in.execute = machine::reduce;
  collective(in, Class::shuffle, 2);
}

// --- computing -------------------------------------------------------------------------------------------------------

void Parser::convert(Instruction& in) {
  static const std::map<std::string, Rounding> roundings = {
    {"rn", Rounding::nearest}, {"rz", Rounding::zero}, {"rni", Rounding::integer_nearest},
    {"rzi", Rounding::integer_zero}, {"rmi", Rounding::integer_down}, {"rpi", Rounding::integer_up},
    {"rna", Rounding::nearest_away},
  };
  need(2);
  in.counted = Class::convert;
  in.source_type = last_type();
  in.type = parts.size() > 2 ? type_named(parts[parts.size() - 2]) : Type::none;
  bool saturates_finite = false;
  for (size_t i = 1; i + 2 < parts.size(); i++) {
    const std::string& part = parts[i];
    if (roundings.count(part)) in.rounding = roundings.at(part);
    else if (part == "ftz") in.modifiers |= FLUSH_SUBNORMALS;
    else if (part == "sat") in.modifiers |= SATURATE;
    else if (part == "relu") in.modifiers |= RELU;
    else if (part == "satfinite") saturates_finite = true;
    else die("modifier " + part + " of " + opcode);
  }
  auto is_tiny = [](Type type) { return type == Type::e4m3x2 || type == Type::e5m2x2; };
  if (is_tiny(in.type) || is_tiny(in.source_type)) return convert_tiny(in);
  if (in.type == Type::none || in.source_type == Type::none || saturates_finite)
    die("unsupported instruction " + opcode);
  if (in.type == Type::f16x2 || in.type == Type::bf16x2) {
    need(3);
    if (in.source_type != Type::f32) die("unsupported instruction " + opcode);
    in.operands[0] = destination(operands[0], 4);
    in.operands[1] = source(operands[1], 4);
    in.operands[2] = source(operands[2], 4);
    in.execute = convert_pair;
    return;
  }
  int to = 0, from = std::max(2, bytes_of(in.source_type));
  in.operands[0] = any_destination(operands[0], to);
  Operand where;
  find_register(operands[1], where, from);
  in.operands[1] = source(operands[1], from);
  in.register_bytes = (u8)to;
  in.source_bytes = (u8)from;
  Handler common = find_conversion(opcode + ":" + std::to_string(to) + std::to_string(from));
  in.execute = common ? common : machine::convert;
}

// cvt.rn.satfinite.e4m3x2.f32 d, high, low; cvt.rn.satfinite.e4m3x2.f16x2 d, a; cvt.rn.f16x2.e4m3x2 d, a
void Parser::convert_tiny(Instruction& in) {
  if (in.source_type == Type::f32) {
    need(3);
    in.operands[0] = destination(operands[0], 2);
    in.operands[1] = source(operands[1], 4);
    in.operands[2] = source(operands[2], 4);
    in.execute = convert_tiny_from_floats;
  } else if (in.source_type == Type::f16x2) {
    in.operands[0] = destination(operands[0], 2);
    in.operands[1] = source(operands[1], 4);
    in.execute = convert_tiny_from_halves;
  } else if (in.type == Type::f16x2) {
    in.operands[0] = destination(operands[0], 4);
    in.operands[1] = source(operands[1], 2);
    in.execute = convert_tiny_to_halves;
  } else {
    die("unsupported instruction " + opcode);
  }
}

void Parser::move(Instruction& in) {
  need(2);
  if (operands[0][0] == '{' || operands[1][0] == '{') return vector_move(in);
  if (operands[1].rfind("%clock", 0) == 0 || operands[1] == "%globaltimer") {
    int width = 4;
    in.operands[0] = any_destination(operands[0], width);
    in.register_bytes = (u8)width;
    in.execute = read_clock;
    return;
  }
  plain(in);
}

void Parser::vector_move(Instruction& in) {
  bool unpacks = operands[0][0] == '{';
  auto names = vector_parts(operands[unpacks ? 0 : 1]);
  int whole = bytes_of(last_type()), width = whole / (int)names.size();
  in.counted = Class::move;
  in.elements = (u8)names.size();
  in.element_bytes = (u8)width;
  in.source_bytes = (u8)whole;
  if (whole > 8) die("unsupported instruction " + opcode);
  Operand where;
  for (const std::string& name : names) find_register(name, where, width);
  in.register_bytes = (u8)width;
  in.execute = find_vector_move(unpacks, whole, in.element_bytes, width);
  in.operands[0] = unpacks ? source(operands[1], whole) : destination(operands[0], whole);
  for (size_t i = 0; i < names.size(); i++) {
    in.operands[1 + i] = unpacks ? destination(names[i], width) : source(names[i], width);
  }
}

// setp.cmp[.bool][.ftz].type p[|q], a, b [, c]
void Parser::compare(Instruction& in) {
  need(3);
  in.counted = Class::predicate;
  std::string first, second, key = parts[0], combined;
  bool two = split_pair(operands[0], first, second);
  for (size_t i = 1; i < parts.size(); i++) {
    bool is_boolean = i > 1 && (parts[i] == "and" || parts[i] == "or" || parts[i] == "xor");
    if (is_boolean) combined = parts[i]; else key += "." + parts[i];
  }
  if (Handler pairs = find_pair_comparison(last_type())) {
    auto known = std::find(std::begin(COMPARISONS), std::end(COMPARISONS), parts[1]);
    if (known == std::end(COMPARISONS) || !combined.empty()) die("unsupported instruction " + opcode);
    in.variant = (u8)(known - std::begin(COMPARISONS));
    in.operands[2] = source(operands[1], 4);
    in.operands[3] = source(operands[2], 4);
    in.operands[0] = destination(first, 0);
    in.operands[1] = destination(second, 0);
    in.execute = pairs;
    return;
  }
  const Plain* found = find_plain(key);
  if (!found || two) die("unsupported instruction " + opcode);
  in.operands[1] = source(operands[1], found->widths[1]);
  in.operands[2] = source(operands[2], found->widths[2]);
  in.operands[0] = destination(first, 0);
  in.execute = found->execute;
  if (combined.empty()) return;
  need(4);
  in.operands[3] = predicate_source(operands[3], in);
  in.variant = combined == "and" ? 0 : combined == "or" ? 1 : 2;
  in.inner = in.execute;
  in.execute = combined_comparison;
}

void Parser::plain(Instruction& in) {
  const Plain* found = find_plain(opcode);
  if (!found) die("unsupported instruction " + opcode);
  if ((int)operands.size() != found->operands) die("number of operands of " + opcode);
  in.operands[0] = destination(operands[0], found->widths[0]);
  for (int i = 1; i < found->operands; i++) in.operands[i] = source(operands[i], found->widths[i]);
  in.execute = found->execute;
  in.counted = found->counted;
}

}  // namespace machine
