//! FNSTENV, FLDENV, FNSAVE and FRSTOR (Intel SDM volume 1, 8.1.10).

use crate::operand::real_mode;
use crate::x87;
use iced_x86::{Code, Instruction};
use x86_core::{Core, Seg, Trap, X87Area};

/// Which of the four layouts.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// Fields of 32 bits, else 16.
    wide: bool,
    /// Real and virtual-8086 mode: linear pointers and the opcode.
    real: bool,
}

impl Layout {
    fn of(core: &Core, insn: &Instruction) -> Self {
        use Code::*;
        let wide =
            matches!(insn.code(), Fnstenv_m28byte | Fldenv_m28byte | Fnsave_m108byte | Frstor_m108byte);
        Self { wide, real: real_mode(core) }
    }

    /// Bytes of the environment.
    fn len(self) -> usize {
        if self.wide { 28 } else { 14 }
    }

    /// The environment's bytes.
    fn encode(self, area: &X87Area) -> [u8; 28] {
        let pointer =
            |at: usize| u32::from_le_bytes([area.0[at], area.0[at + 1], area.0[at + 2], area.0[at + 3]]);
        let (fip, fdp) = (pointer(8), pointer(16));
        let fop = u32::from(u16::from_le_bytes([area.0[6], area.0[7]]) & 0x7ff);
        let control = u32::from(x87::control(area));
        let status = u32::from(x87::status_word(area));
        let tags = u32::from(x87::full_tags(area));
        // The unused halves of 32-bit fields are ones.
        const HIGH: u32 = 0xffff_0000;
        let fields = match (self.wide, self.real) {
            (true, false) => [HIGH | control, HIGH | status, HIGH | tags, fip, fop << 16, fdp, HIGH],
            (true, true) => [
                HIGH | control,
                HIGH | status,
                HIGH | tags,
                HIGH | fip & 0xffff,
                fip >> 16 << 12 | fop,
                HIGH | fdp & 0xffff,
                fdp >> 16 << 12,
            ],
            (false, false) => [control, status, tags, fip, 0, fdp, 0],
            (false, true) => [control, status, tags, fip, fip >> 16 << 12 | fop, fdp, fdp >> 16 << 12],
        };
        let mut bytes = [0; 28];
        let size = self.len() / 7;
        for (place, field) in bytes.chunks_exact_mut(size).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes()[..size]);
        }
        bytes
    }

    /// Loads the environment from its bytes.
    fn decode(self, area: &mut X87Area, bytes: &[u8]) {
        let size = self.len() / 7;
        let mut fields = [0u32; 7];
        for (field, bytes) in fields.iter_mut().zip(bytes.chunks_exact(size)) {
            let mut value = [0; 4];
            value[..size].copy_from_slice(bytes);
            *field = u32::from_le_bytes(value);
        }
        let [control, status, tags, fip, high, fdp, data_high] = fields;
        x87::set_control(area, control as u16);
        x87::set_status(area, status as u16);
        area.0[4] = x87::abridged_tags(tags as u16);
        let (fop, fip, fdp) = match (self.wide, self.real) {
            (true, false) => (high >> 16, fip, fdp),
            (false, false) => (0, fip, fdp),
            (_, true) => {
                let upper = |field: u32| (field >> 12 & 0xffff) << 16;
                (high, fip & 0xffff | upper(high), fdp & 0xffff | upper(data_high))
            }
        };
        area.0[6..8].copy_from_slice(&(fop as u16 & 0x7ff).to_le_bytes());
        area.0[8..16].copy_from_slice(&u64::from(fip).to_le_bytes());
        area.0[16..24].copy_from_slice(&u64::from(fdp).to_le_bytes());
        x87::summarize(area);
    }
}

/// FNSTENV.
pub(crate) fn store(core: &mut Core, (seg, offset): (Seg, u64), insn: &Instruction) -> Result<(), Trap> {
    let layout = Layout::of(core, insn);
    core.write_bytes(seg, offset, &layout.encode(&core.cpu.x87)[..layout.len()])?;
    // All exceptions are masked afterwards.
    let control = x87::control(&core.cpu.x87);
    x87::set_control(&mut core.cpu.x87, control | x87::status::EXCEPTIONS);
    x87::summarize(&mut core.cpu.x87);
    Ok(())
}

/// FLDENV.
pub(crate) fn load(core: &mut Core, (seg, offset): (Seg, u64), insn: &Instruction) -> Result<(), Trap> {
    let layout = Layout::of(core, insn);
    let mut bytes = [0; 28];
    let bytes = &mut bytes[..layout.len()];
    core.read_bytes(seg, offset, bytes)?;
    // Registers stay where they are physically, the image has them by their place in the stack.
    let mut area = core.cpu.x87;
    x87::enter_mmx(&mut area);
    layout.decode(&mut area, bytes);
    let top = x87::top(&area);
    area.0[32..160].rotate_left(16 * top);
    core.cpu.x87 = area;
    Ok(())
}

/// FNSAVE.
pub(crate) fn save(core: &mut Core, (seg, offset): (Seg, u64), insn: &Instruction) -> Result<(), Trap> {
    let layout = Layout::of(core, insn);
    let len = layout.len();
    let mut bytes = [0; 108];
    bytes[..28].copy_from_slice(&layout.encode(&core.cpu.x87));
    for (place, register) in bytes[len..].chunks_exact_mut(10).zip(core.cpu.x87.0[32..160].chunks(16)) {
        place.copy_from_slice(&register[..10]);
    }
    core.write_bytes(seg, offset, &bytes[..len + 80])?;
    // FNINIT empties the stack, but leaves the registers, which are again named from physical 0.
    x87::enter_mmx(&mut core.cpu.x87);
    x87::init(&mut core.cpu.x87);
    Ok(())
}

/// FRSTOR.
pub(crate) fn restore(core: &mut Core, (seg, offset): (Seg, u64), insn: &Instruction) -> Result<(), Trap> {
    let layout = Layout::of(core, insn);
    let len = layout.len();
    let mut bytes = [0; 108];
    let bytes = &mut bytes[..len + 80];
    core.read_bytes(seg, offset, bytes)?;
    let area = &mut core.cpu.x87;
    layout.decode(area, &bytes[..len]);
    for (register, value) in area.0[32..160].chunks_mut(16).zip(bytes[len..].chunks_exact(10)) {
        register[..10].copy_from_slice(value);
    }
    Ok(())
}
