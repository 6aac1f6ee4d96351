//! Graphs, and their making by stream capture.
//!
//! While a stream captures, what is put on it becomes a node instead of running. A capture spreads to other
//! streams when they wait for an event that was recorded in it, and has to be joined back before its end.
//! What CUDA prohibits meanwhile is refused with CUDA's code, and spoils the capture where CUDA says so.

use crate::core::{Work, locked};
use crate::error::{Code, Result, SimError};
use crate::machine::Machine;
use crate::stream::StreamInner;
use crate::types::{CaptureInfo, CaptureMode, CaptureStatus, ExecId, GraphId, NodeId, NodeKind, StreamId};
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::ThreadId;

thread_local! {
    static MODE: Cell<CaptureMode> = const { Cell::new(CaptureMode::Global) };
}

#[derive(Debug)]
struct Node {
    kind: NodeKind,
    work: Work,
    after: Vec<NodeId>,
}

#[derive(Debug, Default)]
struct Graph {
    nodes: Vec<Node>,
}

/// Where a node is: graph in the high half, position counted from 1 in the low half.
fn node_id(graph: GraphId, index: usize) -> NodeId {
    NodeId(graph.0 << 32 | (index as u64 + 1))
}

#[derive(Debug)]
struct Member {
    stream: StreamId,
    device: u32,
    blocking: bool,
    frontier: Vec<NodeId>,
}

#[derive(Debug)]
struct Capture {
    mode: CaptureMode,
    thread: ThreadId,
    origin: StreamId,
    graph: GraphId,
    owns_graph: bool,
    /// Where a graph is captured again: the nodes that it had, as they are to be again.
    before: Option<Vec<Node>>,
    spoilt: bool,
    members: Vec<Member>,
}

#[derive(Debug, Default)]
struct Tables {
    captures: HashMap<u64, Capture>,
    graphs: HashMap<GraphId, Graph>,
    execs: HashMap<ExecId, Arc<Vec<Work>>>,
    last: u64,
}

/// All graphs and captures of a machine.
#[derive(Debug, Default)]
pub struct Captures {
    tables: Mutex<Tables>,
    /// How many captures there are, so that machines that do not capture pay one load.
    active: AtomicUsize,
}

impl Tables {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn of_stream(&mut self, stream: StreamId) -> Option<(u64, &mut Capture)> {
        let found =
            self.captures.iter_mut().find(|(_, capture)| capture.members.iter().any(|member| member.stream == stream));
        found.map(|(id, capture)| (*id, capture))
    }

    fn new_graph(&mut self) -> GraphId {
        let id = GraphId(self.next());
        self.graphs.insert(id, Graph::default());
        id
    }

    /// Everything that comes before `nodes`, and they themselves.
    fn ancestors(&self, graph: GraphId, nodes: &[NodeId]) -> HashSet<NodeId> {
        let mut seen: HashSet<NodeId> = HashSet::new();
        let mut todo = nodes.to_vec();
        while let Some(node) = todo.pop() {
            if seen.insert(node)
                && let Some(found) = self.graphs.get(&graph).and_then(|graph| graph.nodes.get(index_of(node)))
            {
                todo.extend(&found.after);
            }
        }
        seen
    }
}

fn index_of(node: NodeId) -> usize {
    (node.0 & 0xFFFF_FFFF) as usize - 1
}

impl Capture {
    fn member(&mut self, stream: StreamId) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.stream == stream)
    }
}

fn spoilt() -> SimError {
    Code::CAPTURE_INVALIDATED.because("the capture was spoilt by an earlier error; end it")
}

fn capturing(doing: &str) -> SimError {
    Code::CAPTURE_UNSUPPORTED.because(format!("{doing} is not permitted while a stream captures"))
}

fn no_graph(graph: GraphId) -> SimError {
    Code::INVALID_VALUE.because(format!("there is no graph {:#x}", graph.0))
}

/// What the other modules ask before they act.
impl Machine {
    fn capture_tables(&self) -> MutexGuard<'_, Tables> {
        locked(&self.captures().tables)
    }

    fn none_capture(&self) -> bool {
        self.captures().active.load(Ordering::Acquire) == 0
    }

    pub(crate) fn is_capturing(&self, stream: StreamId) -> bool {
        !self.none_capture() && self.capture_tables().of_stream(stream).is_some()
    }

    /// Synchronising or asking a capturing stream: refused, and the capture is spoilt.
    pub(crate) fn refuse_capturing(&self, stream: StreamId) -> Result<()> {
        if self.none_capture() {
            return Ok(());
        }
        match self.capture_tables().of_stream(stream) {
            None => Ok(()),
            Some((_, capture)) => {
                capture.spoilt = true;
                Err(capturing("waiting for, or asking, a capturing stream"))
            }
        }
    }

    /// Waiting on a capturing stream for what is not in the capture: refused, and the capture is spoilt.
    pub(crate) fn refuse_isolation(&self, stream: StreamId) -> Result<()> {
        if self.none_capture() {
            return Ok(());
        }
        match self.capture_tables().of_stream(stream) {
            None => Ok(()),
            Some((_, capture)) if capture.spoilt => Err(spoilt()),
            Some((_, capture)) => {
                capture.spoilt = true;
                Err(Code::CAPTURE_ISOLATION
                    .because("a capturing stream cannot wait for an event recorded outside the capture"))
            }
        }
    }

    /// Using the legacy stream while a blocking stream of its device captures: refused, and those captures are spoilt.
    pub(crate) fn refuse_legacy(&self, stream: &StreamInner) -> Result<()> {
        if !stream.legacy || self.none_capture() {
            return Ok(());
        }
        let concerned = |member: &Member| member.blocking && member.device == stream.device;
        if self.spoil(|capture| capture.members.iter().any(concerned)) {
            return Err(
                Code::CAPTURE_IMPLICIT.because("the legacy default stream would depend on a stream that captures")
            );
        }
        Ok(())
    }

    /// Synchronising a device on which a stream captures: refused, and those captures are spoilt.
    pub(crate) fn refuse_device_capturing(&self, device: u32) -> Result<()> {
        if self.none_capture() {
            return Ok(());
        }
        if self.spoil(|capture| capture.members.iter().any(|member| member.device == device)) {
            return Err(capturing("synchronising the device"));
        }
        Ok(())
    }

    /// The error for synchronising or asking an event recorded in a capture, which is spoilt if it still runs.
    pub(crate) fn refuse_captured_event(&self, id: u64) -> SimError {
        if let Some(capture) = self.capture_tables().captures.get_mut(&id) {
            capture.spoilt = true;
        }
        Code::CAPTURED_EVENT.because("the event was last recorded in a capture, and stands for no work that runs")
    }

    /// Spoils the captures that `concerned` picks; whether there was one.
    fn spoil(&self, concerned: impl Fn(&Capture) -> bool) -> bool {
        let mut any = false;
        for capture in self.capture_tables().captures.values_mut().filter(|capture| concerned(capture)) {
            capture.spoilt = true;
            any = true;
        }
        any
    }

    /// For functions that CUDA calls potentially unsafe (`cudaMalloc` and its like ask this themselves): refused,
    /// and the capture spoilt, where the calling thread's mode and the captures' modes forbid them.
    ///
    /// # Errors
    /// `CAPTURE_UNSUPPORTED`.
    pub fn unsafe_call(&self) -> Result<()> {
        if self.none_capture() {
            return Ok(());
        }
        let (mode, here) = (MODE.get(), std::thread::current().id());
        let forbids = |capture: &Capture| match mode {
            CaptureMode::Relaxed => false,
            CaptureMode::ThreadLocal => capture.thread == here && capture.mode != CaptureMode::Relaxed,
            CaptureMode::Global => {
                (capture.thread == here && capture.mode != CaptureMode::Relaxed) || capture.mode == CaptureMode::Global
            }
        };
        if self.spoil(forbids) { Err(capturing("this call")) } else { Ok(()) }
    }

    /// The same for functions of which CUDA's manual does not say whether they are potentially unsafe.
    pub(crate) fn maybe_unsafe_call(&self) -> Result<()> {
        if self.core().options.strict_capture { self.unsafe_call() } else { Ok(()) }
    }

    /// The capture that a stream takes part in, and the nodes that an event recorded there stands for.
    pub(crate) fn captured_frontier(&self, stream: StreamId) -> Result<Option<(u64, Vec<NodeId>)>> {
        if self.none_capture() {
            return Ok(None);
        }
        match self.capture_tables().of_stream(stream) {
            None => Ok(None),
            Some((_, capture)) if capture.spoilt => Err(spoilt()),
            Some((id, capture)) => {
                Ok(Some((id, capture.member(stream).map(|member| member.frontier.clone()).unwrap_or_default())))
            }
        }
    }

    /// A stream waits for an event recorded in capture `id`: it takes part from now on.
    pub(crate) fn join_capture(&self, stream: &StreamInner, id: u64, nodes: &[NodeId]) -> Result<()> {
        let mut tables = self.capture_tables();
        if let Some((own, capture)) = tables.of_stream(stream.id)
            && own != id
        {
            capture.spoilt = true;
            return Err(Code::CAPTURE_MERGE.because("two captures cannot be merged"));
        }
        let Some(capture) = tables.captures.get_mut(&id) else {
            return Err(Code::CAPTURED_EVENT.because("the event was recorded in a capture that has ended"));
        };
        if capture.spoilt {
            return Err(spoilt());
        }
        if stream.legacy {
            capture.spoilt = true;
            return Err(Code::CAPTURE_IMPLICIT.because("the legacy default stream cannot take part in a capture"));
        }
        if capture.member(stream.id).is_none() {
            capture.members.push(Member {
                stream: stream.id,
                device: stream.device,
                blocking: stream.blocking,
                frontier: Vec::new(),
            });
        }
        if let Some(member) = capture.member(stream.id) {
            let fresh = nodes.iter().filter(|node| !member.frontier.contains(node)).copied().collect::<Vec<_>>();
            member.frontier.extend(fresh);
        }
        Ok(())
    }

    /// Adds a node if the stream captures; whether it does.
    pub(crate) fn capture_node(&self, stream: StreamId, kind: NodeKind, work: &Work) -> Result<bool> {
        if self.none_capture() {
            return Ok(false);
        }
        let mut tables = self.capture_tables();
        let Some((_, capture)) = tables.of_stream(stream) else { return Ok(false) };
        if capture.spoilt {
            return Err(spoilt());
        }
        let graph = capture.graph;
        let after = capture.member(stream).map(|member| member.frontier.clone()).unwrap_or_default();
        let nodes = &mut tables.graphs.get_mut(&graph).ok_or_else(|| no_graph(graph))?.nodes;
        let id = node_id(graph, nodes.len());
        nodes.push(Node { kind, work: work.clone(), after });
        if let Some(member) = tables.of_stream(stream).and_then(|(_, capture)| capture.member(stream)) {
            member.frontier = vec![id];
        }
        Ok(true)
    }

    /// A stream is destroyed: a capture that it takes part in is spoilt, and over if it began there.
    pub(crate) fn abandon_capture(&self, stream: StreamId) {
        if self.none_capture() {
            return;
        }
        let mut tables = self.capture_tables();
        let Some((id, capture)) = tables.of_stream(stream) else { return };
        capture.spoilt = true;
        if capture.origin == stream {
            self.end(&mut tables, id);
        }
    }

    /// Takes the capture out of the tables.
    fn end(&self, tables: &mut Tables, id: u64) -> Option<Capture> {
        let capture = tables.captures.remove(&id)?;
        self.captures().active.fetch_sub(1, Ordering::AcqRel);
        Some(capture)
    }
}

/// Capture.
impl Machine {
    /// Starts to capture into a new graph.
    ///
    /// # Errors
    /// `CAPTURE_UNSUPPORTED` for the legacy stream; `ILLEGAL_STATE` if the stream captures already.
    pub fn capture_begin(&self, stream: StreamId, mode: CaptureMode) -> Result<()> {
        self.begin(stream, None, &[], mode)
    }

    /// Starts to capture into an existing graph, after `dependencies`.
    ///
    /// # Errors
    /// As [`Machine::capture_begin`]; `INVALID_VALUE` if there is no such graph.
    pub fn capture_begin_to_graph(
        &self,
        stream: StreamId,
        graph: GraphId,
        dependencies: &[NodeId],
        mode: CaptureMode,
    ) -> Result<()> {
        self.begin(stream, Some(graph), dependencies, mode)
    }

    /// Starts to capture into an existing graph what it has been made of before: the same nodes in the same order, whose parameters are the new ones then.
    ///
    /// # Errors
    /// As [`Machine::capture_begin_to_graph`].
    pub fn capture_begin_again(&self, stream: StreamId, graph: GraphId, mode: CaptureMode) -> Result<()> {
        self.begin(stream, Some(graph), &[], mode)?;
        let mut tables = self.capture_tables();
        let before = tables.graphs.get_mut(&graph).map(|graph| std::mem::take(&mut graph.nodes));
        if let Some((_, capture)) = tables.of_stream(stream) {
            capture.before = before;
        }
        Ok(())
    }

    fn begin(
        &self,
        stream: StreamId,
        graph: Option<GraphId>,
        dependencies: &[NodeId],
        mode: CaptureMode,
    ) -> Result<()> {
        let target = self.stream(stream)?;
        self.core().check_alive(target.device)?;
        if target.legacy {
            return Err(capturing("capturing the legacy default stream"));
        }
        let mut tables = self.capture_tables();
        if tables.of_stream(stream).is_some() {
            return Err(Code::ILLEGAL_STATE.because("the stream captures already"));
        }
        if let Some(graph) = graph
            && !tables.graphs.contains_key(&graph)
        {
            return Err(no_graph(graph));
        }
        let owns_graph = graph.is_none();
        let graph = graph.unwrap_or_else(|| tables.new_graph());
        let member =
            Member { stream, device: target.device, blocking: target.blocking, frontier: dependencies.to_vec() };
        let thread = std::thread::current().id();
        let id = tables.next();
        tables.captures.insert(
            id,
            Capture {
                mode,
                thread,
                origin: stream,
                graph,
                owns_graph,
                before: None,
                spoilt: false,
                members: vec![member],
            },
        );
        self.captures().active.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Ends the capture that began on this stream; the graph.
    ///
    /// # Errors
    /// `ILLEGAL_STATE` if the stream does not capture; `CAPTURE_UNMATCHED`, `CAPTURE_WRONG_THREAD` (the capture goes on, spoilt);
    /// `CAPTURE_INVALIDATED`, `CAPTURE_UNJOINED` (the capture is over, without a graph); `INVALID_VALUE` for other nodes than a graph had that was captured
    /// again (it has the new ones; a real driver's is then only good for being destroyed).
    pub fn capture_end(&self, stream: StreamId) -> Result<GraphId> {
        self.stream(stream)?;
        let mut tables = self.capture_tables();
        let Some((id, capture)) = tables.of_stream(stream) else {
            return Err(Code::ILLEGAL_STATE.because("the stream does not capture"));
        };
        if capture.origin != stream {
            capture.spoilt = true;
            return Err(Code::CAPTURE_UNMATCHED.because("the capture was not begun on this stream"));
        }
        if capture.mode != CaptureMode::Relaxed && capture.thread != std::thread::current().id() {
            capture.spoilt = true;
            return Err(
                Code::CAPTURE_WRONG_THREAD.because("the capture was begun by another thread, not in relaxed mode")
            );
        }
        let Some(capture) = self.end(&mut tables, id) else { return Err(spoilt()) };
        let outcome = check_joined(&tables, &capture).and_then(|()| check_again(&tables, &capture));
        if outcome.is_err() && capture.owns_graph {
            tables.graphs.remove(&capture.graph);
        }
        outcome.map(|()| capture.graph)
    }

    /// The capture that the stream takes part in.
    ///
    /// # Errors
    /// `CAPTURE_IMPLICIT` for the legacy stream while a blocking stream of its device captures (which spoils nothing).
    pub fn capture_info(&self, stream: StreamId) -> Result<CaptureInfo> {
        let target = self.stream(stream)?;
        let none = CaptureInfo { status: CaptureStatus::None, id: 0, graph: None, dependencies: Vec::new() };
        if self.none_capture() {
            return Ok(none);
        }
        let mut tables = self.capture_tables();
        let beside = |member: &Member| member.blocking && member.device == target.device;
        if target.legacy && tables.captures.values().any(|capture| capture.members.iter().any(beside)) {
            return Err(
                Code::CAPTURE_IMPLICIT.because("a stream that captures is ordered with the legacy default stream")
            );
        }
        let Some((id, capture)) = tables.of_stream(stream) else { return Ok(none) };
        let status = if capture.spoilt { CaptureStatus::Invalidated } else { CaptureStatus::Active };
        let graph = Some(capture.graph);
        let dependencies = capture.member(stream).map(|member| member.frontier.clone()).unwrap_or_default();
        Ok(CaptureInfo { status, id, graph, dependencies })
    }

    /// Sets the calling thread's mode; the old one.
    pub fn thread_exchange_mode(&self, mode: CaptureMode) -> CaptureMode {
        MODE.replace(mode)
    }
}

fn check_joined(tables: &Tables, capture: &Capture) -> Result<()> {
    if capture.spoilt {
        return Err(spoilt());
    }
    let end =
        capture.members.iter().find(|member| member.stream == capture.origin).map(|member| member.frontier.as_slice());
    let joined = tables.ancestors(capture.graph, end.unwrap_or_default());
    if capture.members.iter().flat_map(|member| &member.frontier).all(|node| joined.contains(node)) {
        Ok(())
    } else {
        Err(Code::CAPTURE_UNJOINED
            .because("a stream that took part in the capture was not joined to the stream that began it"))
    }
}

fn check_again(tables: &Tables, capture: &Capture) -> Result<()> {
    let Some(before) = &capture.before else { return Ok(()) };
    let nodes = tables.graphs.get(&capture.graph).map_or(&[][..], |graph| &graph.nodes);
    let alike = |(old, new): (&Node, &Node)| old.kind == new.kind && old.after == new.after;
    if before.len() == nodes.len() && before.iter().zip(nodes).all(alike) {
        Ok(())
    } else {
        Err(Code::INVALID_VALUE.because("a graph was captured again as another one"))
    }
}

/// Graphs.
impl Machine {
    /// An empty graph.
    ///
    /// # Errors
    /// `NOT_INITIALIZED`, `DEINITIALIZED`.
    pub fn graph_create(&self) -> Result<GraphId> {
        self.core().check_open()?;
        Ok(self.capture_tables().new_graph())
    }

    /// Destroys a graph; what was instantiated from it stays.
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is no such graph.
    pub fn graph_destroy(&self, graph: GraphId) -> Result<()> {
        self.core().check_open()?;
        self.capture_tables().graphs.remove(&graph).map(drop).ok_or_else(|| no_graph(graph))
    }

    /// The graph's nodes, in the order in which they were made.
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is no such graph.
    pub fn graph_nodes(&self, graph: GraphId) -> Result<Vec<NodeId>> {
        let tables = self.capture_tables();
        let found = tables.graphs.get(&graph).ok_or_else(|| no_graph(graph))?;
        Ok((0..found.nodes.len()).map(|index| node_id(graph, index)).collect())
    }

    /// The graph's edges, as (before, after).
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is no such graph.
    pub fn graph_edges(&self, graph: GraphId) -> Result<Vec<(NodeId, NodeId)>> {
        let tables = self.capture_tables();
        let found = tables.graphs.get(&graph).ok_or_else(|| no_graph(graph))?;
        let edges = found
            .nodes
            .iter()
            .enumerate()
            .flat_map(|(index, node)| node.after.iter().map(move |before| (*before, node_id(graph, index))));
        Ok(edges.collect())
    }

    /// What a node does.
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is no such node.
    pub fn node_kind(&self, node: NodeId) -> Result<NodeKind> {
        let tables = self.capture_tables();
        let found = tables
            .graphs
            .get(&GraphId(node.0 >> 32))
            .and_then(|graph| graph.nodes.get(((node.0 & 0xFFFF_FFFF) as usize).checked_sub(1)?));
        found
            .map(|node| node.kind)
            .ok_or_else(|| Code::INVALID_VALUE.because(format!("there is no node {:#x}", node.0)))
    }

    /// Makes a graph launchable. Nodes run in the order in which they were made, which respects the edges.
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is no such graph.
    pub fn graph_instantiate(&self, graph: GraphId) -> Result<ExecId> {
        self.core().check_open()?;
        let mut tables = self.capture_tables();
        let found = tables.graphs.get(&graph).ok_or_else(|| no_graph(graph))?;
        let body = Arc::new(found.nodes.iter().map(|node| node.work.clone()).collect());
        let id = ExecId(tables.next());
        tables.execs.insert(id, body);
        Ok(id)
    }

    /// Destroys what `graph_instantiate` made; launches that are queued still run.
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is no such thing.
    pub fn exec_destroy(&self, exec: ExecId) -> Result<()> {
        self.core().check_open()?;
        self.capture_tables().execs.remove(&exec).map(drop).ok_or_else(|| no_exec(exec))
    }

    /// Runs the graph in the stream (or makes it a node, if the stream captures).
    ///
    /// # Errors
    /// `INVALID_VALUE` if there is no such thing; capture prohibitions; the device's sticky error.
    pub fn graph_launch(&self, exec: ExecId, stream: StreamId) -> Result<()> {
        self.core().check_open()?;
        let body = self.capture_tables().execs.get(&exec).cloned().ok_or_else(|| no_exec(exec))?;
        self.submit(stream, NodeKind::Graph, Work::Graph(body)).map(drop)
    }
}

fn no_exec(exec: ExecId) -> SimError {
    Code::INVALID_VALUE.because(format!("there is no instantiated graph {:#x}", exec.0))
}
