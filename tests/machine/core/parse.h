// PTX text -> Kernel. parse.cpp reads directives, declarations and labels; decode.cpp makes instructions of statements;
// allocate.cpp gives registers their places.
#pragma once
#include <memory>
#include "instruction.h"

namespace machine {

struct ParseError : std::runtime_error { using std::runtime_error::runtime_error; };

std::unique_ptr<Kernel> parse(const char* ptx);

std::string trimmed(const std::string& text);
std::vector<std::string> split(const std::string& text, char at);
std::vector<std::string> parts_of(const std::string& text);       // at commas outside of brackets
std::vector<std::string> vector_parts(const std::string& text);   // "{a, b}" or "a"
Type type_named(const std::string& name);                         // none: no type
bool parse_number(const std::string& text, u64& value);           // integers, 0f3F800000, 0d..., true, false

// A register that an instruction reads or writes.
struct Touch { Operand where; bool written; };
using Widths = std::map<Operand, int>;                            // of each register; 0: predicate

// Moves registers whose lives do not meet to common places. touches: of each instruction.
void allocate(Kernel& kernel, const std::vector<std::vector<Touch>>& touches, const Widths& widths);

class Parser {
 public:
  explicit Parser(const char* ptx) : text(ptx), size(strlen(ptx)) {}
  std::unique_ptr<Kernel> run();

 private:
  // parse.cpp: reading
  [[noreturn]] void die(const std::string& why);
  bool at(const char* word) const { return !strncmp(text + place, word, strlen(word)); }
  void skip_blanks();
  std::string rest_of_line();
  std::string until_semicolon();
  bool label();
  void directive();
  void line_directive();
  void entry();
  void parameter(const std::string& declaration);
  void declare_registers(const std::string& declaration);
  void declare_variable(const std::string& declaration);
  void finish();

  // parse.cpp: operands
  Operand new_register(int width);
  Operand constant(u64 value, int width);
  bool find_register(const std::string& name, Operand& where, int& width);
  bool read_register(const std::string& name, Operand& where, int& width);
  bool symbol(const std::string& name, u64& value);
  Operand special(const std::string& name);
  Operand source(const std::string& name, int width);             // width 0: predicate
  Operand destination(const std::string& name, int width);
  Operand any_destination(const std::string& name, int& width);   // width: told
  void address(const std::string& text, Instruction& in);
  void address(const std::string& text, Operand& base, s64& offset, u8& width);
  static bool split_offset(const std::string& inside, std::string& base, s64& offset);
  Operand predicate_source(std::string name, Instruction& in);    // "!%p1" sets NEGATED

  // decode.cpp
  using Decoder = void (Parser::*)(Instruction&);
  static const std::map<std::string, Decoder>& decoders();
  void statement(const std::string& statement);
  void guard(std::string& statement, Instruction& in);
  bool has(const char* part) const;
  Type last_type() const { return type_named(parts.back()); }
  void need(size_t operands);
  u64 number(const std::string& text);
  void collective(Instruction& in, Class counted, size_t mask_operand);
  void sources(Instruction& in, const std::string& list, int width, int first);
  void emit(Instruction& in);
  std::string memory_modifiers(Instruction& in, bool atomic);
  void branch(Instruction&);
  void exit(Instruction&);
  void trap(Instruction&);
  void barrier(Instruction&);
  void fence(Instruction&);
  void hint(Instruction&);
  void load(Instruction&);
  void store(Instruction&);
  void atomic(Instruction&);
  void async_copy(Instruction&);
  void load_matrix(Instruction&);
  void store_matrix(Instruction&);
  void matrix(Instruction&);
  void group_matrix(Instruction&);
  void shuffle(Instruction&);
  void vote(Instruction&);
  void active_mask(Instruction&);
  void match(Instruction&);
  void reduce(Instruction&);
  void convert(Instruction&); void convert_tiny(Instruction&); void move(Instruction&); void vector_move(Instruction&);
  void compare(Instruction&); void plain(Instruction&);

  struct Names {                                                  // of a scope: a, a<3>, and the registers in use
    std::map<std::string, Type> single;
    std::map<std::string, std::pair<Type, int>> numbered;
    std::map<std::string, std::pair<Operand, int>> registers;
    Type type_of(const std::string& name) const;                  // none: not declared here
  };

  const char* text;
  size_t size, place = 0;
  int line = 1, statement_line = 1, location = -1;
  std::unique_ptr<Kernel> kernel = std::make_unique<Kernel>();
  std::vector<Names> scopes;
  std::map<std::string, s32> labels;
  std::vector<std::pair<int, std::string>> jumps;                 // instruction, label
  std::map<std::string, u64> symbols;  // offsets in shared or local memory, addresses of globals
  std::map<std::string, int> parameters;
  std::vector<std::string> dynamic_shared;                        // extern arrays: they begin after the others
  std::map<std::pair<u64, int>, Operand> constants;
  std::vector<char> constant_data;
  std::map<Special, Operand> specials;
  Widths widths;
  std::vector<Touch> touched;                                     // by the statement being read
  std::vector<std::vector<Touch>> touches;
  // The statement being read: "ld.global.b32 %r1, [%rd2]" is opcode, its parts, and operands.
  std::string opcode;
  std::vector<std::string> parts, operands;
};

}  // namespace machine
