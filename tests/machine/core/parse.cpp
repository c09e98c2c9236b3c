// PTX text: directives, declarations, labels, operands.
#include "parse.h"
#include <algorithm>
#include <cstdlib>

namespace machine {

// --- words -----------------------------------------------------------------------------------------------------------

std::string trimmed(const std::string& text) {
  size_t first = text.find_first_not_of(" \t\n\r"), last = text.find_last_not_of(" \t\n\r");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == at) parts.emplace_back(); else parts.back() += c;
  }
  return parts;
}

std::vector<std::string> parts_of(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : text) {
    if (strchr("{[(", c)) depth++;
    if (strchr("}])", c)) depth--;
    if (c == ',' && depth == 0) { parts.push_back(trimmed(part)); part.clear(); } else part += c;
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

std::vector<std::string> vector_parts(const std::string& text) {
  std::string inside = trimmed(text);
  if (inside.empty() || inside[0] != '{') return {inside};
  return parts_of(inside.substr(1, inside.size() - 2));
}

struct TypeName { const char* name; Type type; int bytes; };
constexpr TypeName TYPES[] = {
  {"pred", Type::pred, 0}, {"b8", Type::b8, 1}, {"u8", Type::u8, 1}, {"s8", Type::s8, 1}, {"b16", Type::b16, 2},
  {"u16", Type::u16, 2}, {"s16", Type::s16, 2}, {"f16", Type::f16, 2}, {"bf16", Type::bf16, 2}, {"b32", Type::b32, 4},
  {"u32", Type::u32, 4}, {"s32", Type::s32, 4}, {"f32", Type::f32, 4}, {"tf32", Type::tf32, 4},
  {"f16x2", Type::f16x2, 4}, {"bf16x2", Type::bf16x2, 4}, {"b64", Type::b64, 8}, {"u64", Type::u64, 8},
  {"s64", Type::s64, 8}, {"f64", Type::f64, 8}, {"b128", Type::b128, 16}, {"e4m3", Type::e4m3, 1},
  {"e5m2", Type::e5m2, 1}, {"e4m3x2", Type::e4m3x2, 2}, {"e5m2x2", Type::e5m2x2, 2},
};

Type type_named(const std::string& name) {
  static const auto types = [] {
    std::map<std::string, Type> map;
    for (const TypeName& type : TYPES) map[type.name] = type.type;
    return map;
  }();
  auto found = types.find(name);
  return found == types.end() ? Type::none : found->second;
}
int bytes_of(Type type) {
  for (const TypeName& known : TYPES) {
    if (known.type == type) return known.bytes;
  }
  return 4;
}
bool is_float(Type type) {
  return type == Type::f16 || type == Type::bf16 || type == Type::f32 || type == Type::tf32 || type == Type::f64;
}
bool is_signed(Type type) { return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64; }

bool parse_number(const std::string& text, u64& value) {
  auto hexadecimal = [&](size_t length, char kind) {
    return text.size() == length && text[0] == '0' && tolower(text[1]) == kind;
  };
  if (hexadecimal(10, 'f') || hexadecimal(18, 'd')) {
    value = strtoull(text.c_str() + 2, nullptr, 16);
    return true;
  }
  if (text == "true" || text == "false") { value = text == "true"; return true; }
  bool sign = !text.empty() && (text[0] == '-' || text[0] == '+');
  if (text.size() <= sign || !isdigit(text[sign])) return false;
  char* end;
  value = strtoull(text.c_str() + sign, &end, 0);
  if (*end == 'U') end++;
  if (text[0] == '-') value = 0 - value;
  return *end == 0;
}

// --- reading ---------------------------------------------------------------------------------------------------------

void Parser::die(const std::string& why) { throw ParseError("line " + std::to_string(line) + ": " + why); }

void Parser::skip_blanks() {
  while (place < size) {
    if (at("//")) {
      rest_of_line();
    } else if (at("/*")) {
      for (; place < size && !at("*/"); place++) line += text[place] == '\n';
      place = std::min(place + 2, size);
    } else if (isspace(text[place])) {
      line += text[place++] == '\n';
    } else {
      return;
    }
  }
}

std::string Parser::rest_of_line() {
  size_t start = place;
  while (place < size && text[place] != '\n') place++;
  return std::string(text + start, place - start);
}

// Text up to a semicolon outside of braces, which is consumed; comments dropped.
std::string Parser::until_semicolon() {
  std::string found;
  for (int depth = 0; place < size; place++) {
    if (at("//")) rest_of_line();
    char c = text[place];
    if (c == '{') depth++;
    if (c == '}') depth--;
    if (c == ';' && depth <= 0) { place++; break; }
    line += c == '\n';
    found += c;
  }
  return trimmed(found);
}

bool Parser::label() {
  size_t end = place;
  while (end < size && (isalnum(text[end]) || strchr("_$%", text[end]))) end++;
  if (end == place || end >= size || text[end] != ':') return false;
  labels[std::string(text + place, end - place)] = (s32)kernel->code.size();
  place = end + 1;
  return true;
}

std::unique_ptr<Kernel> Parser::run() {
  kernel->text = split("\n" + std::string(text), '\n');
  for (std::string& row : kernel->text) row = trimmed(row);
  scopes.emplace_back();
  bool in_body = false;
  for (skip_blanks(); place < size; skip_blanks()) {
    statement_line = line;
    char c = text[place];
    if (c == '{') {
      place++;
      scopes.emplace_back();
      in_body = true;
    } else if (c == '}') {
      place++;
      scopes.pop_back();
      if (in_body && scopes.size() == 1) break;  // the rest is debugging information
    } else if (c == ';') {
      place++;
    } else if (at(".section")) {
      break;
    } else if (c == '.') {
      directive();
    } else if (!label()) {
      statement(until_semicolon());
    }
  }
  finish();
  return std::move(kernel);
}

void Parser::directive() {
  if (at(".loc") && !at(".local")) return line_directive();
  if (at(".visible .entry") || at(".entry")) return entry();
  for (const char* ignored : {".version", ".target", ".address_size", ".file", ".maxnreg", ".minnctapersm"}) {
    if (at(ignored)) { rest_of_line(); return; }
  }
  if (at(".reqntid") || at(".maxntid")) {
    auto axes = parts_of(rest_of_line().substr(8));
    for (size_t i = 0; i < axes.size() && i < 3; i++) kernel->threads[i] = atoi(axes[i].c_str());
    return;
  }
  std::string declaration = until_semicolon();
  auto mentions = [&](const char* word) { return declaration.find(word) != std::string::npos; };
  if (declaration.rfind(".reg", 0) == 0) {
    declare_registers(declaration);
  } else if (mentions(".extern .func") || declaration.rfind(".pragma", 0) == 0) {
    // a call of it would be refused
  } else if (mentions(".global") || mentions(".shared") || mentions(".const") || mentions(".local")) {
    declare_variable(declaration);
  } else {
    die("directive " + declaration);
  }
}

void Parser::line_directive() {
  std::string directive = rest_of_line();
  size_t comment = directive.find("//");
  kernel->sources.push_back(comment == std::string::npos ? directive : trimmed(directive.substr(comment + 2)));
  location = (int)kernel->sources.size() - 1;
}

void Parser::entry() {
  std::string head;
  for (; place < size && text[place] != '('; place++) head += text[place];
  kernel->name = trimmed(head.substr(head.find(".entry") + 6));
  std::string list;
  for (place++; place < size && text[place] != ')'; place++) {
    line += text[place] == '\n';
    list += text[place];
  }
  place++;
  for (const std::string& declaration : parts_of(list)) parameter(declaration);
}

// .param .u64 .ptr .global .align 1 name, or .param .align 4 .b8 name[12]
void Parser::parameter(const std::string& declaration) {
  std::vector<std::string> words;
  for (const std::string& word : split(declaration, ' ')) {
    if (!trimmed(word).empty()) words.push_back(trimmed(word));
  }
  Type type = Type::b8;
  int alignment = 0, count = 1;
  for (size_t i = 0; i + 1 < words.size(); i++) {
    if (words[i] == ".align") alignment = atoi(words[i + 1].c_str());
    if (Type named = type_named(words[i].substr(1)); words[i][0] == '.' && named != Type::none) type = named;
  }
  std::string name = words.back();
  size_t bracket = name.find('[');
  bool is_array = bracket != std::string::npos;
  if (is_array) {
    count = atoi(name.c_str() + bracket + 1);
    name.resize(bracket);
  }
  int bytes = bytes_of(type) * count;
  if (!is_array || !alignment) alignment = bytes_of(type);
  int offset = (kernel->parameter_bytes + alignment - 1) / alignment * alignment;
  parameters[name] = offset;
  kernel->parameters.push_back({name, offset, bytes, declaration.find(".ptr") != std::string::npos});
  kernel->parameter_bytes = offset + bytes;
}

// .reg .b32 %r<10>, single;
void Parser::declare_registers(const std::string& declaration) {
  std::string rest = trimmed(declaration.substr(declaration.find('.', 1)));
  size_t end = rest.find_first_of(" \t");
  Type type = type_named(rest.substr(1, end - 1));
  if (type == Type::none) die("register type " + rest);
  Names& scope = scopes.back();
  for (const std::string& name : parts_of(rest.substr(end))) {
    size_t angle = name.find('<');
    std::string base = name.substr(0, angle);
    if (angle == std::string::npos) scope.single[base] = type;
    else scope.numbered[base] = {type, atoi(name.c_str() + angle + 1)};
    // Scopes come and go: names used before in this one mean new registers.
    auto is_meant = [&](const std::string& used) {
      if (angle == std::string::npos) return used == base;
      return used.size() > base.size() && used.rfind(base, 0) == 0 && isdigit(used[base.size()]);
    };
    for (auto used = scope.registers.begin(); used != scope.registers.end();) {
      used = is_meant(used->first) ? scope.registers.erase(used) : std::next(used);
    }
  }
}

// .shared .align 4 .b8 name[16]; .extern .shared ...; .local ...; .global .align 1 .b8 name[3] = {1, 2, 3};
void Parser::declare_variable(const std::string& declaration) {
  size_t equals = declaration.find('=');
  std::string head = trimmed(declaration.substr(0, equals));
  auto mentions = [&](const char* word) { return head.find(word) != std::string::npos; };
  int alignment = mentions(".align") ? atoi(head.c_str() + head.find(".align") + 6) : 16;
  size_t bracket = std::min(head.find('['), head.size());
  size_t start = head.find_last_of(" \t", bracket - 1) + 1;
  std::string name = trimmed(head.substr(start, bracket - start));
  Type type = Type::b8;
  for (const std::string& word : split(head, ' ')) {
    if (Type named = type_named(word.substr(std::min<size_t>(1, word.size()))); named != Type::none) type = named;
  }
  size_t width = bytes_of(type);
  size_t bytes = width * (bracket == head.size() ? 1 : strtoull(head.c_str() + bracket + 1, nullptr, 0));
  auto aligned = [&](size_t offset) { return (offset + alignment - 1) / alignment * alignment; };
  if (mentions(".shared")) {
    if (mentions(".extern")) {
      dynamic_shared.push_back(name);
    } else {
      symbols[name] = aligned(kernel->static_shared);
      kernel->static_shared = (int)(symbols[name] + bytes);
    }
    for (const std::string& array : dynamic_shared) symbols[array] = (kernel->static_shared + 15) / 16 * 16;
    return;
  }
  if (mentions(".local")) {
    symbols[name] = aligned(kernel->local_bytes);
    kernel->local_bytes = symbols[name] + bytes;
    return;
  }
  auto* data = (char*)aligned_alloc(64, (bytes + 127) / 64 * 64);
  memset(data, 0, bytes + 1);
  kernel->globals.push_back({data, bytes});
  symbols[name] = (u64)data;
  if (equals == std::string::npos) return;
  size_t i = 0;
  for (const std::string& initial : vector_parts(declaration.substr(equals + 1))) {
    u64 value;
    if (!parse_number(initial, value) || (i + 1) * width > bytes) die("initial value " + initial);
    memcpy(data + i++ * width, &value, width);
  }
}

void Parser::finish() {
  for (auto& [instruction, name] : jumps) {
    auto found = labels.find(name);
    if (found == labels.end()) die("label " + name);
    kernel->code[instruction].target = found->second;
  }
  Instruction end;
  end.kind = Kind::exit;
  end.counted = Class::branch;
  end.execute = nullptr;
  touched.clear();
  emit(end);
  allocate(*kernel, touches, widths);
  kernel->register_bytes = (kernel->register_bytes + 63) / 64 * 64 + 64;
  kernel->local_bytes = (kernel->local_bytes + 15) / 16 * 16;
  size_t bytes = (constant_data.size() + 127) / 64 * 64;
  kernel->constants = {(char*)aligned_alloc(64, bytes), bytes};
  std::copy(constant_data.begin(), constant_data.end(), kernel->constants.data);
}

Kernel::~Kernel() {
  free(constants.data);
  for (Span& span : globals) free(span.data);
}

std::unique_ptr<Kernel> parse(const char* ptx) { return Parser(ptx).run(); }

// --- operands --------------------------------------------------------------------------------------------------------

Operand Parser::new_register(int width) {
  auto where = (Operand)kernel->register_bytes;
  widths[where] = width;
  kernel->register_bytes += width ? (size_t)width * LANES : 32;  // of a predicate's 32 bytes four are used
  return where;
}

Operand Parser::constant(u64 value, int width) {
  if (width == 0) value = value ? ALL_LANES : 0;
  if (width == 1 || width == 2 || width == 4) value &= (1ull << (8 * width)) - 1;
  auto [found, is_new] = constants.try_emplace({value, width}, 0);
  if (is_new) {
    size_t start = constant_data.size();
    constant_data.resize(start + (width ? LANES * width : 32));
    if (width == 0) memcpy(&constant_data[start], &value, 4);
    for (int i = 0; width && i < LANES; i++) memcpy(&constant_data[start + i * width], &value, width);
    found->second = (Operand)start | CONSTANT;
  }
  return found->second;
}

Type Parser::Names::type_of(const std::string& name) const {
  if (auto found = single.find(name); found != single.end()) return found->second;
  size_t digits = name.size();
  while (digits > 0 && isdigit(name[digits - 1])) digits--;
  auto found = numbered.find(name.substr(0, digits));
  bool is_one = digits < name.size() && found != numbered.end() && atoi(name.c_str() + digits) < found->second.second;
  return is_one ? found->second.first : Type::none;
}

bool Parser::find_register(const std::string& name, Operand& where, int& width) {
  for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
    auto known = scope->registers.find(name);
    if (known == scope->registers.end()) {
      Type type = scope->type_of(name);
      if (type == Type::none) continue;
      int bytes = type == Type::pred ? 0 : std::max(2, bytes_of(type));
      known = scope->registers.emplace(name, std::make_pair(new_register(bytes), bytes)).first;
    }
    std::tie(where, width) = known->second;
    return true;
  }
  return false;
}

bool Parser::read_register(const std::string& name, Operand& where, int& width) {
  if (!find_register(name, where, width)) return false;
  touched.push_back({where, false});
  return true;
}

bool Parser::symbol(const std::string& name, u64& value) {
  auto found = symbols.find(name);
  if (found == symbols.end()) return false;
  value = found->second;
  return true;
}

constexpr std::pair<const char*, Special> SPECIALS[] = {
  {"%tid.x", Special::tid_x}, {"%tid.y", Special::tid_y}, {"%tid.z", Special::tid_z}, {"%ntid.x", Special::ntid_x},
  {"%ntid.y", Special::ntid_y}, {"%ntid.z", Special::ntid_z}, {"%ctaid.x", Special::ctaid_x},
  {"%ctaid.y", Special::ctaid_y}, {"%ctaid.z", Special::ctaid_z}, {"%nctaid.x", Special::nctaid_x},
  {"%nctaid.y", Special::nctaid_y}, {"%nctaid.z", Special::nctaid_z}, {"%laneid", Special::laneid},
  {"%warpid", Special::warpid}, {"%nwarpid", Special::nwarpid}, {"%smid", Special::smid}, {"%nsmid", Special::nsmid},
  {"%lanemask_lt", Special::lanemask_lt}, {"%lanemask_le", Special::lanemask_le},
  {"%lanemask_gt", Special::lanemask_gt}, {"%lanemask_ge", Special::lanemask_ge},
  {"%lanemask_eq", Special::lanemask_eq},
};

// Special registers are ordinary ones, filled when a program starts.
Operand Parser::special(const std::string& name) {
  for (auto& [known, which] : SPECIALS) {
    if (name != known) continue;
    auto [found, is_new] = specials.try_emplace(which, 0);
    if (is_new) {
      found->second = new_register(4);
      kernel->specials.push_back({found->second, which});
    }
    touched.push_back({found->second, false});
    return found->second;
  }
  return ABSENT;
}

Operand Parser::source(const std::string& name, int width) {
  Operand where;
  int found;
  if (read_register(name, where, found)) {
    if (found != width)
      die("operand " + name + " is " + std::to_string(found) + " bytes wide, expected " + std::to_string(width));
    return where;
  }
  if (name == "_") return ABSENT;
  if ((where = special(name)) != ABSENT) return where;
  u64 value, added = 0;
  if (parse_number(name, value)) return constant(value, width);
  size_t plus = name.find('+');  // symbol+offset
  if (plus != std::string::npos && !parse_number(trimmed(name.substr(plus + 1)), added)) die("operand " + name);
  if (symbol(trimmed(name.substr(0, plus)), value)) return constant(value + added, width);
  die("operand " + name);
}

Operand Parser::any_destination(const std::string& name, int& width) {
  Operand where = ABSENT;
  if (name == "_") return where;
  if (!read_register(name, where, width)) die("destination " + name);
  touched.back().written = true;
  return where;
}

Operand Parser::destination(const std::string& name, int width) {
  int found = width;
  Operand where = any_destination(name, found);
  if (found != width)
    die("destination " + name + " is " + std::to_string(found) + " bytes wide, expected " + std::to_string(width));
  return where;
}

Operand Parser::predicate_source(std::string name, Instruction& in) {
  if (name[0] == '!') {
    in.modifiers |= NEGATED;
    name = trimmed(name.substr(1));
  }
  return source(name, 0);
}

// "base + -4" -> base, -4
bool Parser::split_offset(const std::string& inside, std::string& base, s64& offset) {
  base = inside;
  offset = 0;
  size_t cut = inside.find_first_of("+-", 1);
  if (cut == std::string::npos) return true;
  std::string number = inside.substr(inside[cut] == '+' ? cut + 1 : cut);
  number.erase(std::remove(number.begin(), number.end(), ' '), number.end());
  base = trimmed(inside.substr(0, cut));
  return parse_number(number, (u64&)offset);
}

void Parser::address(const std::string& operand, Operand& base, s64& offset, u8& width) {
  if (operand.empty() || operand[0] != '[') die("address " + operand);
  std::string name;
  if (!split_offset(trimmed(operand.substr(1, operand.size() - 2)), name, offset)) die("address " + operand);
  base = ABSENT;
  width = 8;
  u64 value;
  int found;
  if (read_register(name, base, found)) {
    width = (u8)found;
  } else if (symbol(name, value) || parse_number(name, value)) {
    offset += (s64)value;
  } else {
    die("address " + operand);
  }
}

void Parser::address(const std::string& operand, Instruction& in) {
  address(operand, in.base, in.offset, in.address_bytes);
}

}  // namespace machine
