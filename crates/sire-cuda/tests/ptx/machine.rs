//! A machine for the few PTX instructions that `hash.ptx` uses: one block at a time, lane after lane up to the next barrier.
//! Anything unknown is a failure, so that the kernel cannot use what is not checked here.

use std::collections::HashMap;

/// Device memory: ranges of bytes.
pub struct Memory(Vec<(u64, Vec<u8>)>);

impl Memory {
    pub fn new(ranges: Vec<(u64, Vec<u8>)>) -> Memory {
        Memory(ranges)
    }

    fn word(&mut self, addr: u64) -> &mut [u8] {
        let inside = |(base, bytes): &&mut (u64, Vec<u8>)| *base <= addr && addr + 8 <= base + bytes.len() as u64;
        let (base, bytes) = self.0.iter_mut().find(inside).unwrap_or_else(|| panic!("nothing is at {addr:#x}"));
        assert_eq!(addr % 8, 0, "{addr:#x} is not aligned");
        let at = (addr - *base) as usize;
        &mut bytes[at..at + 8]
    }

    /// The word at `addr`. Memory that ends within it reads as zeros there.
    pub fn read(&self, addr: u64) -> u64 {
        let inside = |(base, bytes): &&(u64, Vec<u8>)| *base <= addr && addr + 8 <= base + bytes.len() as u64;
        let (base, bytes) = self.0.iter().find(inside).unwrap_or_else(|| panic!("nothing is at {addr:#x}"));
        assert_eq!(addr % 8, 0, "{addr:#x} is not aligned");
        let at = (addr - base) as usize;
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn write(&mut self, addr: u64, value: u64) {
        self.word(addr).copy_from_slice(&value.to_le_bytes());
    }
}

#[derive(Clone, Debug)]
enum Operand {
    Register(usize),
    Value(u64),
    /// `%tid.x`, `%ctaid.x`, `%ctaid.y`.
    Special(usize),
    /// `[register + offset]`.
    At(usize, u64),
    /// `[parameter]`.
    Parameter(usize),
    Pair(usize, usize),
    Label(String),
}

#[derive(Debug)]
struct Instruction {
    /// Only if this register is (true) or is not (false) set.
    guard: Option<(usize, bool)>,
    opcode: String,
    operands: Vec<Operand>,
}

/// A parsed kernel.
#[derive(Debug)]
pub struct Kernel {
    instructions: Vec<Instruction>,
    labels: HashMap<String, usize>,
    /// Bits of each register.
    widths: Vec<u32>,
    shared: usize,
}

/// Names on the way through the text.
#[derive(Default)]
struct Names {
    registers: HashMap<String, usize>,
    parameters: Vec<String>,
    shared: HashMap<String, usize>,
    widths: Vec<u32>,
}

impl Names {
    fn declare(&mut self, statement: &str) -> bool {
        let words: Vec<&str> = statement.split([' ', ',', '\t']).filter(|word| !word.is_empty()).collect();
        match words[..] {
            [".reg", kind, ref names @ ..] => {
                let bits = match kind {
                    ".pred" => 1,
                    ".b32" => 32,
                    ".b64" => 64,
                    other => panic!("a register of type {other}"),
                };
                for name in names {
                    assert!(self.registers.insert((*name).to_owned(), self.widths.len()).is_none(), "{name} twice");
                    self.widths.push(bits);
                }
            }
            [".shared", ".align", "8", ".b8", name] => {
                let (name, size) = name.split_once('[').unwrap();
                self.shared.insert(name.to_owned(), size.trim_end_matches(']').parse().unwrap());
            }
            _ => return false,
        }
        true
    }

    fn operand(&self, text: &str) -> Operand {
        let register = |name: &str| self.registers.get(name.trim()).copied();
        if let Some(inner) = text.strip_prefix('[') {
            let inner = inner.trim_end_matches(']');
            if let Some(index) = self.parameters.iter().position(|name| name == inner) {
                return Operand::Parameter(index);
            }
            let (name, offset) = inner.split_once('+').unwrap_or((inner, "0"));
            return Operand::At(register(name).unwrap_or_else(|| panic!("[{inner}]")), offset.parse().unwrap());
        }
        if let Some(pair) = text.strip_prefix('{') {
            let (one, other) = pair.trim_end_matches('}').split_once(',').unwrap();
            return Operand::Pair(register(one).unwrap(), register(other).unwrap());
        }
        if let Some(index) = ["%tid.x", "%ctaid.x", "%ctaid.y"].iter().position(|name| *name == text) {
            return Operand::Special(index);
        }
        if let Some(register) = register(text) {
            return Operand::Register(register);
        }
        if self.shared.contains_key(text) {
            return Operand::Value(0);
        }
        let value = match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex.trim_end_matches('U'), 16).ok(),
            None => text.parse().ok(),
        };
        value.map_or_else(|| Operand::Label(text.to_owned()), Operand::Value)
    }
}

/// Splits operands at commas outside braces.
fn split(text: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for c in text.chars() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            _ => {}
        }
        parts.last_mut().unwrap().push(c);
    }
    parts.into_iter().map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}

impl Kernel {
    pub fn parse(text: &str, entry: &str) -> Kernel {
        let code: String = text.lines().map(|line| line.split("//").next().unwrap().to_owned() + "\n").collect();
        let (_, rest) = code.split_once(&format!(".visible .entry {entry}(")).unwrap();
        let (parameters, rest) = rest.split_once(')').unwrap();
        let (head, body) = rest.split_once('{').unwrap();
        assert_eq!(head.trim(), ".maxntid 256, 1, 1");
        let parameter = |text: &str| text.trim().strip_prefix(".param .u64 ").unwrap().to_owned();
        let parameters = parameters.split(',').map(parameter).collect();
        let mut names = Names { parameters, ..Names::default() };
        let (mut instructions, mut labels) = (Vec::new(), HashMap::new());
        let body = body.rsplit_once('}').unwrap().0;
        for mut statement in body.split(';').map(str::trim).filter(|statement| !statement.is_empty()) {
            while let Some((label, rest)) = statement.split_once(':') {
                labels.insert(label.trim().to_owned(), instructions.len());
                statement = rest.trim();
            }
            if names.declare(statement) {
                continue;
            }
            let mut guard = None;
            if let Some(rest) = statement.strip_prefix('@') {
                let (name, rest) = rest.split_once(' ').unwrap();
                let register = names.registers[name.trim_start_matches('!')];
                guard = Some((register, !name.starts_with('!')));
                statement = rest.trim();
            }
            let (opcode, operands) = statement.split_once([' ', '\t']).unwrap_or((statement, ""));
            let operands = split(operands).iter().map(|operand| names.operand(operand)).collect();
            instructions.push(Instruction { guard, opcode: opcode.to_owned(), operands });
        }
        Kernel { instructions, labels, shared: names.shared.values().sum(), widths: names.widths }
    }

    /// Runs one block of `lanes` threads to its end.
    pub fn block(&self, block: (u32, u32), lanes: u32, parameters: &[u64], memory: &mut Memory) {
        let mut shared = vec![None; self.shared / 8];
        let new = |tid| Lane {
            kernel: self,
            parameters,
            special: [tid, block.0, block.1],
            next: 0,
            registers: vec![0; self.widths.len()],
        };
        let mut all: Vec<Lane<'_>> = (0..lanes).map(new).collect();
        loop {
            let stops: Vec<Stop> = all.iter_mut().map(|lane| lane.run(memory, &mut shared)).collect();
            if stops.iter().all(|stop| *stop == Stop::End) {
                return;
            }
            assert!(
                stops.iter().all(|stop| *stop == Stop::Barrier),
                "some lanes are at a barrier, and others have ended"
            );
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    Barrier,
    End,
}

struct Lane<'a> {
    kernel: &'a Kernel,
    parameters: &'a [u64],
    special: [u32; 3],
    next: usize,
    registers: Vec<u64>,
}

impl Lane<'_> {
    fn get(&self, operand: &Operand) -> u64 {
        match operand {
            Operand::Register(index) => self.registers[*index],
            Operand::Value(value) => *value,
            Operand::Special(index) => u64::from(self.special[*index]),
            Operand::At(register, offset) => self.registers[*register] + offset,
            Operand::Parameter(index) => self.parameters[*index],
            other => panic!("{other:?} has no value"),
        }
    }

    fn set(&mut self, operand: &Operand, value: u64) {
        let Operand::Register(index) = operand else { panic!("{operand:?} cannot be set") };
        self.set_register(*index, value);
    }

    fn set_register(&mut self, index: usize, value: u64) {
        let bits = self.kernel.widths[index];
        self.registers[index] = if bits == 64 { value } else { value & ((1 << bits) - 1) };
    }

    fn run(&mut self, memory: &mut Memory, shared: &mut [Option<u64>]) -> Stop {
        loop {
            let instruction = &self.kernel.instructions[self.next];
            self.next += 1;
            if instruction.guard.is_some_and(|(register, wanted)| (self.registers[register] == 1) != wanted) {
                continue;
            }
            let o = &instruction.operands;
            match instruction.opcode.as_str() {
                "ret" => return Stop::End,
                "bar.sync" => return Stop::Barrier,
                "bra" => {
                    let Operand::Label(label) = &o[0] else { panic!("a branch to {:?}", o[0]) };
                    self.next = self.kernel.labels[label];
                }
                "ld.global.v2.u64" => {
                    let (Operand::Pair(x, y), addr) = (&o[0], self.get(&o[1])) else { panic!("{o:?}") };
                    assert_eq!(addr % 16, 0, "{addr:#x} is not aligned");
                    self.set_register(*x, memory.read(addr));
                    self.set_register(*y, memory.read(addr + 8));
                }
                "ld.global.u64" => self.set(&o[0], memory.read(self.get(&o[1]))),
                "st.global.u64" => memory.write(self.get(&o[0]), self.get(&o[1])),
                "red.global.add.u64" => {
                    let addr = self.get(&o[0]);
                    memory.write(addr, memory.read(addr).wrapping_add(self.get(&o[1])));
                }
                "red.global.or.b64" => {
                    let addr = self.get(&o[0]);
                    memory.write(addr, memory.read(addr) | self.get(&o[1]));
                }
                "st.shared.u64" => shared[self.get(&o[0]) as usize / 8] = Some(self.get(&o[1])),
                "ld.shared.u64" => {
                    let found = shared[self.get(&o[1]) as usize / 8];
                    self.set(&o[0], found.unwrap_or_else(|| panic!("shared memory is read before it is written")));
                }
                opcode => {
                    let value = compute(opcode, self.get(&o[1]), o.get(2).map_or(0, |operand| self.get(operand)));
                    self.set(&o[0], value);
                }
            }
        }
    }
}

fn compute(opcode: &str, a: u64, b: u64) -> u64 {
    let shift = |bits: u64, shifted: fn(u64, u32) -> u64| if b >= bits { 0 } else { shifted(a, b as u32) };
    match opcode {
        "ld.param.u64" | "mov.u64" | "mov.u32" | "cvt.u64.u32" | "cvt.u32.u64" => a,
        "add.u64" | "add.u32" => a.wrapping_add(b),
        "sub.u64" | "sub.u32" => a.wrapping_sub(b),
        "mul.lo.u64" => a.wrapping_mul(b),
        "min.u64" => a.min(b),
        "and.b64" => a & b,
        "or.b64" => a | b,
        "xor.b64" => a ^ b,
        "shl.b64" => shift(64, |a, b| a << b),
        "shl.b32" => shift(32, |a, b| a << b),
        "shr.u64" => shift(64, |a, b| a >> b),
        "shr.u32" => shift(32, |a, b| a >> b),
        "setp.ge.u64" | "setp.ge.u32" => u64::from(a >= b),
        "setp.eq.u64" => u64::from(a == b),
        "setp.ne.u64" | "setp.ne.u32" => u64::from(a != b),
        other => panic!("the interpreter does not know {other}"),
    }
}
