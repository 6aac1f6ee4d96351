//! Capture, graphs, and the user objects that graphs keep alive.

use super::memory::stream_of;
use crate::abi::{Handle, HostFn};
use crate::boundary::{In, Out, Text, export};
use crate::release;
use crate::state::lock;
use sire_sim::{
    CaptureInfo, CaptureMode, CaptureStatus, Code, ExecId, GraphId, Machine, NodeId, NodeKind, Result, StreamId,
};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::fmt::Write as _;
use std::sync::{LazyLock, Mutex};

/// The capture mode of a number.
pub fn mode_of(mode: c_int) -> Result<CaptureMode> {
    Ok(match mode {
        0 => CaptureMode::Global,
        1 => CaptureMode::ThreadLocal,
        2 => CaptureMode::Relaxed,
        _ => return Err(Code::INVALID_VALUE.because(format!("{mode} is not a capture mode"))),
    })
}

/// Swaps the thread's capture mode with the one at `mode`.
pub fn exchange_mode(machine: &Machine, mode: Out<c_int>) -> Result<()> {
    let new = mode_of(mode.get()?)?;
    mode.set(machine.thread_exchange_mode(new) as c_int)
}

thread_local! {
    /// What the last capture query of this thread points its caller to.
    static DEPENDENCIES: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Where a capture query writes.
pub struct CaptureOutputs {
    pub status: Out<c_int>,
    pub id: Out<c_ulonglong>,
    pub graph: Out<Handle>,
    pub dependencies: Out<*const Handle>,
    pub edges: Out<Handle>,
    pub count: Out<usize>,
}

impl CaptureOutputs {
    /// What the query's first form told.
    pub fn brief(status: Out<c_int>, id: Out<c_ulonglong>) -> CaptureOutputs {
        CaptureOutputs {
            status,
            id,
            graph: Out::none(),
            dependencies: Out::none(),
            edges: Out::none(),
            count: Out::none(),
        }
    }
}

/// Describes the capture of `stream`; the dependency array lives until the thread's next query.
pub fn describe_capture(machine: &Machine, stream: Handle, outputs: &CaptureOutputs) -> Result<()> {
    let info: CaptureInfo = machine.capture_info(stream_of(machine, stream)?)?;
    outputs.status.set(info.status as c_int)?;
    if info.status != CaptureStatus::Active {
        return Ok(());
    }
    outputs.id.set_if(info.id);
    if let Some(graph) = info.graph {
        outputs.graph.set_if(graph.0 as Handle);
        remember_nodes(machine, graph)?;
    }
    outputs.count.set_if(info.dependencies.len());
    outputs.edges.set_if(std::ptr::null_mut());
    let place = DEPENDENCIES.try_with(|kept| {
        let mut kept = kept.borrow_mut();
        *kept = info.dependencies.iter().map(|node| node.0).collect();
        kept.as_ptr()
    });
    outputs.dependencies.set_if(place.unwrap_or(std::ptr::null()).cast());
    Ok(())
}

/// Which graph a node belongs to, for the calls that only get the node.
static NODE_GRAPHS: LazyLock<Mutex<HashMap<u64, GraphId>>> = LazyLock::new(Mutex::default);

fn remember_nodes(machine: &Machine, graph: GraphId) -> Result<Vec<NodeId>> {
    let nodes = machine.graph_nodes(graph)?;
    let mut known = lock(&NODE_GRAPHS);
    for node in &nodes {
        known.insert(node.0, graph);
    }
    Ok(nodes)
}

/// `cudaGraphEdgeData`: of an ordinary edge, all zeros, as all of ours are.
type Edge = [u8; 8];

/// The arguments of a query whose CUDA 12 form has no `edges`, so that its count stands in their place.
fn edges_and_count(edges: Out<Edge>, count: Out<usize>) -> (Out<Edge>, Out<usize>) {
    if release::is_12() { (Out::none(), edges.cast()) } else { (edges, count) }
}

/// Answers CUDA's array queries: with no array, only the count; else as many as fit.
fn answer_nodes(nodes: &[NodeId], out: Out<Handle>, count: Out<usize>) -> Result<()> {
    let handles: Vec<Handle> = nodes.iter().map(|node| node.0 as Handle).collect();
    if !out.is_null() {
        let room = count.get()?.min(handles.len());
        out.set_all(&handles[..room]);
    }
    count.set(handles.len())
}

/// Which neighbours of a node.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Before,
    After,
}

fn neighbours(
    machine: &Machine,
    node: Handle,
    side: Side,
    out: Out<Handle>,
    edges: Out<Edge>,
    count: Out<usize>,
) -> Result<()> {
    let graph = lock(&NODE_GRAPHS).get(&(node as u64)).copied();
    let graph = graph.ok_or_else(|| Code::INVALID_VALUE.because(format!("{node:?} is not a node of a known graph")))?;
    let found: Vec<NodeId> = machine
        .graph_edges(graph)?
        .into_iter()
        .map(|(from, to)| if side == Side::Before { (to, from) } else { (from, to) })
        .filter(|(this, _)| this.0 == node as u64)
        .map(|(_, other)| other)
        .collect();
    answer_edges(found.len(), edges, count)?;
    answer_nodes(&found, out, count)
}

fn all_edges(
    machine: &Machine,
    graph: Handle,
    from: Out<Handle>,
    to: Out<Handle>,
    edges: Out<Edge>,
    count: Out<usize>,
) -> Result<()> {
    remember_nodes(machine, GraphId(graph as u64))?;
    let (starts, ends): (Vec<NodeId>, Vec<NodeId>) = machine.graph_edges(GraphId(graph as u64))?.into_iter().unzip();
    if from.is_null() != to.is_null() {
        return Err(Code::INVALID_VALUE.because("edges have two ends: only one of the two arrays is given"));
    }
    if from.is_null() {
        return count.set(starts.len());
    }
    answer_edges(starts.len(), edges, count)?;
    let room = count.get()?;
    answer_nodes(&starts, from, count)?;
    count.set(room)?;
    answer_nodes(&ends, to, count)
}

/// Describes as many edges as there is room for; the count stays.
fn answer_edges(found: usize, edges: Out<Edge>, count: Out<usize>) -> Result<()> {
    if !edges.is_null() {
        edges.set_all(&vec![Edge::default(); found.min(count.get()?)]);
    }
    Ok(())
}

/// `cudaGraphNodeType` of a kind.
fn node_type(kind: NodeKind) -> c_int {
    match kind {
        NodeKind::Kernel => 0,
        NodeKind::Memcpy => 1,
        NodeKind::Memset => 2,
        NodeKind::Host => 3,
        NodeKind::Graph => 4,
        NodeKind::Empty => 5,
    }
}

/// Something that keeps user objects alive.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Owner {
    Graph(u64),
    Exec(u64),
}

struct UserObject {
    references: u64,
    destroy: unsafe extern "C" fn(*mut c_void),
    data: usize,
}

#[derive(Default)]
struct UserObjects {
    next: u64,
    live: HashMap<u64, UserObject>,
    owned: HashMap<Owner, Vec<u64>>,
}

static OBJECTS: LazyLock<Mutex<UserObjects>> = LazyLock::new(Mutex::default);

/// Takes `count` references away; runs the destructor (outside the lock) when none is left.
fn release_object(id: u64, count: u64) -> Result<()> {
    let ended = {
        let mut objects = lock(&OBJECTS);
        let object = objects.live.get_mut(&id).filter(|object| object.references >= count);
        let object = object
            .ok_or_else(|| Code::INVALID_VALUE.because(format!("user object {id} does not have {count} references")))?;
        object.references -= count;
        if object.references == 0 { objects.live.remove(&id) } else { None }
    };
    if let Some(object) = ended {
        // SAFETY: the creator of the user object gave this destructor for this pointer; it is called once, here.
        unsafe { (object.destroy)(object.data as *mut c_void) }
    }
    Ok(())
}

fn release_owner(owner: Owner) -> Result<()> {
    let owned = lock(&OBJECTS).owned.remove(&owner).unwrap_or_default();
    owned.into_iter().try_for_each(|id| release_object(id, 1))
}

/// An executable graph keeps its graph's user objects too.
fn share_objects(from: Owner, to: Owner) {
    let mut objects = lock(&OBJECTS);
    let owned = objects.owned.get(&from).cloned().unwrap_or_default();
    for id in &owned {
        if let Some(object) = objects.live.get_mut(id) {
            object.references += 1;
        }
    }
    if !owned.is_empty() {
        objects.owned.insert(to, owned);
    }
}

fn instantiate(machine: &Machine, out: Out<Handle>, graph: Handle) -> Result<()> {
    let out = out.required()?;
    let exec = machine.graph_instantiate(GraphId(graph as u64))?;
    share_objects(Owner::Graph(graph as u64), Owner::Exec(exec.0));
    out.set(exec.0 as Handle)
}

/// Graphviz text of the graph.
fn dot(machine: &Machine, graph: GraphId) -> Result<String> {
    let mut text = String::from("digraph software_device {\n");
    for node in machine.graph_nodes(graph)? {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  n{} [label=\"{:?} {}\"];", node.0, machine.node_kind(node)?, node.0);
    }
    for (from, to) in machine.graph_edges(graph)? {
        let _ = writeln!(text, "  n{} -> n{};", from.0, to.0);
    }
    text.push_str("}\n");
    Ok(text)
}

/// Captures into a graph that was captured before. `callback` would be asked about nodes whose parameters have changed.
pub fn recapture(machine: &Machine, stream: StreamId, mode: c_int, graph: Handle, callback: Handle) -> Result<()> {
    if !callback.is_null() {
        return Err(Code::NOT_SUPPORTED.because("not simulated: a callback about nodes that are captured again"));
    }
    machine.capture_begin_again(stream, GraphId(graph as u64), mode_of(mode)?)
}

export! { Runtime:
    fn cudaStreamBeginRecaptureToGraph(stream: Handle, mode: c_int, graph: Handle, callback: Handle) |machine| {
        recapture(machine, stream_of(machine, stream)?, mode, graph, callback)
    }
    fn cudaStreamBeginCapture(stream: Handle, mode: c_int) |machine| {
        machine.capture_begin(stream_of(machine, stream)?, mode_of(mode)?)
    }
    fn cudaStreamBeginCaptureToGraph(stream: Handle, graph: Handle, dependencies: In<u64>, _edges: In<u8>, count: usize, mode: c_int) |machine| {
        let nodes: Vec<NodeId> = dependencies.all(count)?.into_iter().map(NodeId).collect();
        machine.capture_begin_to_graph(stream_of(machine, stream)?, GraphId(graph as u64), &nodes, mode_of(mode)?)
    }
    fn cudaStreamEndCapture(stream: Handle, out: Out<Handle>) |machine| {
        let graph = machine.capture_end(stream_of(machine, stream)?);
        if graph.is_err() {
            out.set_if(std::ptr::null_mut());
        }
        out.set(graph?.0 as Handle)
    }
    fn cudaStreamIsCapturing(stream: Handle, status: Out<c_int>) |machine| {
        status.set(machine.capture_info(stream_of(machine, stream)?)?.status as c_int)
    }
    /// CUDA 12 has three arguments under this name.
    fn cudaStreamGetCaptureInfo(stream: Handle, status: Out<c_int>, id: Out<c_ulonglong>, graph: Out<Handle>, dependencies: Out<*const Handle>, edges: Out<Handle>, count: Out<usize>) |machine| {
        let outputs = if release::is_12() {
            CaptureOutputs::brief(status, id)
        } else {
            CaptureOutputs { status, id, graph, dependencies, edges, count }
        };
        describe_capture(machine, stream, &outputs)
    }
    fn cudaStreamGetCaptureInfo_v2(stream: Handle, status: Out<c_int>, id: Out<c_ulonglong>, graph: Out<Handle>, dependencies: Out<*const Handle>, count: Out<usize>) |machine| {
        describe_capture(machine, stream, &CaptureOutputs { status, id, graph, dependencies, edges: Out::none(), count })
    }
    fn cudaStreamGetCaptureInfo_v3(stream: Handle, status: Out<c_int>, id: Out<c_ulonglong>, graph: Out<Handle>, dependencies: Out<*const Handle>, edges: Out<Handle>, count: Out<usize>) |machine| {
        describe_capture(machine, stream, &CaptureOutputs { status, id, graph, dependencies, edges, count })
    }
    fn cudaGraphInstantiate(out: Out<Handle>, graph: Handle, _flags: c_ulonglong) |machine| { instantiate(machine, out, graph) }
    fn cudaGraphInstantiateWithFlags(out: Out<Handle>, graph: Handle, _flags: c_ulonglong) |machine| { instantiate(machine, out, graph) }
    fn cudaGraphLaunch(exec: Handle, stream: Handle) |machine| {
        machine.graph_launch(ExecId(exec as u64), stream_of(machine, stream)?)
    }
    fn cudaGraphUpload(_exec: Handle, stream: Handle) |machine| { stream_of(machine, stream).map(drop) }
    fn cudaDeviceGetGraphMemAttribute(device: c_int, attribute: c_int, value: Out<u64>) |machine| {
        crate::state::check_device(machine, device)?;
        graph_memory_attribute(attribute)?;
        value.set(0)
    }
    fn cudaDeviceSetGraphMemAttribute(device: c_int, attribute: c_int, _value: In<u64>) |machine| {
        crate::state::check_device(machine, device)?;
        graph_memory_attribute(attribute)
    }
    fn cudaDeviceGraphMemTrim(device: c_int) |machine| { crate::state::check_device(machine, device).map(drop) }
}

/// Used and reserved memory of graphs, now and at most: always 0, for no node of ours allocates.
fn graph_memory_attribute(attribute: c_int) -> Result<()> {
    if (0..=3).contains(&attribute) {
        Ok(())
    } else {
        Err(Code::INVALID_VALUE.because(format!("{attribute} is not a graph memory attribute")))
    }
}

export! { RuntimeQuery:
    fn cudaThreadExchangeStreamCaptureMode(mode: Out<c_int>) |machine| { exchange_mode(machine, mode) }
    fn cudaGraphCreate(out: Out<Handle>, _flags: c_uint) |machine| { out.required()?.set(machine.graph_create()?.0 as Handle) }
    fn cudaGraphDestroy(graph: Handle) |machine| {
        machine.graph_destroy(GraphId(graph as u64))?;
        lock(&NODE_GRAPHS).retain(|_, owner| owner.0 != graph as u64);
        release_owner(Owner::Graph(graph as u64))
    }
    fn cudaGraphExecDestroy(exec: Handle) |machine| {
        machine.exec_destroy(ExecId(exec as u64))?;
        release_owner(Owner::Exec(exec as u64))
    }
    fn cudaGraphGetNodes(graph: Handle, nodes: Out<Handle>, count: Out<usize>) |machine| {
        answer_nodes(&remember_nodes(machine, GraphId(graph as u64))?, nodes, count)
    }
    fn cudaGraphNodeGetType(node: Handle, kind: Out<c_int>) |machine| { kind.set(node_type(machine.node_kind(NodeId(node as u64))?)) }
    /// CUDA 12 has no edges under this name, nor under the next two.
    fn cudaGraphNodeGetDependencies(node: Handle, dependencies: Out<Handle>, edges: Out<Edge>, count: Out<usize>) |machine| {
        let (edges, count) = edges_and_count(edges, count);
        neighbours(machine, node, Side::Before, dependencies, edges, count)
    }
    fn cudaGraphNodeGetDependentNodes(node: Handle, dependents: Out<Handle>, edges: Out<Edge>, count: Out<usize>) |machine| {
        let (edges, count) = edges_and_count(edges, count);
        neighbours(machine, node, Side::After, dependents, edges, count)
    }
    fn cudaGraphGetEdges(graph: Handle, from: Out<Handle>, to: Out<Handle>, edges: Out<Edge>, count: Out<usize>) |machine| {
        let (edges, count) = edges_and_count(edges, count);
        all_edges(machine, graph, from, to, edges, count)
    }
    fn cudaGraphNodeGetDependencies_v2(node: Handle, dependencies: Out<Handle>, edges: Out<Edge>, count: Out<usize>) |machine| {
        neighbours(machine, node, Side::Before, dependencies, edges, count)
    }
    fn cudaGraphNodeGetDependentNodes_v2(node: Handle, dependents: Out<Handle>, edges: Out<Edge>, count: Out<usize>) |machine| {
        neighbours(machine, node, Side::After, dependents, edges, count)
    }
    fn cudaGraphGetEdges_v2(graph: Handle, from: Out<Handle>, to: Out<Handle>, edges: Out<Edge>, count: Out<usize>) |machine| {
        all_edges(machine, graph, from, to, edges, count)
    }
    fn cudaGraphDebugDotPrint(graph: Handle, path: Text, _flags: c_uint) |machine| {
        let text = dot(machine, GraphId(graph as u64))?;
        let path = path.get()?;
        std::fs::write(path, text).map_err(|error| Code(304).because(format!("{path}: {error}")))
    }
    fn cudaUserObjectCreate(out: Out<Handle>, data: *mut c_void, destroy: HostFn, references: c_uint, _flags: c_uint) |_machine| {
        let out = out.required()?;
        let destroy = destroy.ok_or_else(|| Code::INVALID_VALUE.because("a user object needs a destructor"))?;
        let mut objects = lock(&OBJECTS);
        objects.next += 1;
        let id = objects.next;
        objects.live.insert(id, UserObject { references: u64::from(references), destroy, data: data as usize });
        out.set(id as Handle)
    }
    fn cudaUserObjectRetain(object: Handle, count: c_uint) |_machine| { retain_object(object as u64, u64::from(count)) }
    fn cudaUserObjectRelease(object: Handle, count: c_uint) |_machine| { release_object(object as u64, u64::from(count)) }
    fn cudaGraphRetainUserObject(graph: Handle, object: Handle, count: c_uint, flags: c_uint) |machine| {
        machine.graph_nodes(GraphId(graph as u64))?;
        let moves = flags & 1 != 0;
        if !moves {
            retain_object(object as u64, u64::from(count))?;
        }
        let mut objects = lock(&OBJECTS);
        let owned = objects.owned.entry(Owner::Graph(graph as u64)).or_default();
        owned.extend(std::iter::repeat_n(object as u64, count as usize));
        Ok(())
    }
}

fn retain_object(id: u64, count: u64) -> Result<()> {
    let mut objects = lock(&OBJECTS);
    let object = objects
        .live
        .get_mut(&id)
        .ok_or_else(|| Code::INVALID_VALUE.because(format!("{id:#x} is not a user object")))?;
    object.references += count;
    Ok(())
}
