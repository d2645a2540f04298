// Streams, events, and the capture of graphs, with the rules of what may not be done meanwhile.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "stand_in.h"

namespace {
pid_t thread_id() { return static_cast<pid_t>(syscall(SYS_gettid)); }

double milliseconds() {
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

Event* event_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

bool captured(const Event* event) {
  return event->capture && state().captures.count(event->capture);
}

// The legacy stream waits for every blocking one, which a stream that is captured cannot allow.
cudaError_t legacy(cudaStream_t stream) {
  if (stream_of(stream)) return cudaSuccess;
  for (auto* capture : state().captures) {
    for (auto* own : capture->streams) {
      if (own->flags & cudaStreamNonBlocking) continue;
      capture->broken = true;
      return cudaErrorStreamCaptureImplicit;
    }
  }
  return cudaSuccess;
}

cudaStreamCaptureStatus status(const Capture* capture) {
  if (!capture) return cudaStreamCaptureStatusNone;
  return capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

// A stream's or an event's own state is asked for while it is captured.
cudaError_t breaks(Capture* capture, const char* what, cudaError_t error) {
  note("violation", "%s of what is being captured", what);
  capture->broken = true;
  return remember(error);
}
}  // namespace

Stream* stream_of(cudaStream_t stream) {
  bool standard = reinterpret_cast<uintptr_t>(stream) <= 2;
  return standard ? nullptr : reinterpret_cast<Stream*>(stream);
}

Capture* capture_of(cudaStream_t stream) {
  Stream* own = stream_of(stream);
  return own && state().streams.count(own) ? own->capture : nullptr;
}

cudaError_t may_synchronize(const char* what) {
  auto mode = thread().mode;
  if (mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto* capture : state().captures) {
    if (capture->mode == cudaStreamCaptureModeRelaxed) continue;
    bool local = capture->mode == cudaStreamCaptureModeThreadLocal ||
                 mode == cudaStreamCaptureModeThreadLocal;
    if (local && capture->thread != thread_id()) continue;
    note("violation", "%s while a stream is being captured", what);
    capture->broken = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  return cudaSuccess;
}

cudaError_t enqueue(cudaStream_t stream, const char* what, std::function<void()> run) {
  if (auto error = legacy(stream)) return error;
  Stream* own = stream_of(stream);
  if (own && !state().streams.count(own)) {
    note("violation", "%s on a stream that is not there", what);
    return cudaErrorInvalidResourceHandle;
  }
  Capture* capture = capture_of(stream);
  if (!capture) {
    run();
    return cudaSuccess;
  }
  if (capture->broken) return cudaErrorStreamCaptureInvalidated;
  capture->graph->nodes.push_back(std::move(run));
  own->version++;
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  Lock lock;
  auto* made = new Stream{thread().device, flags, priority};
  state().streams.insert(made);
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}

// Not freed: captures and events may still name it.
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock;
  state().streams.erase(stream_of(stream));
  return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream) ? stream_of(stream)->priority : 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Lock lock;
  if (auto* capture = capture_of(stream)) {
    return breaks(capture, "cudaStreamSynchronize", cudaErrorStreamCaptureUnsupported);
  }
  return remember(may_synchronize("cudaStreamSynchronize"));
}

API cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Lock lock;
  if (auto* capture = capture_of(stream)) {
    return breaks(capture, "cudaStreamQuery", cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  Lock lock;
  return remember(enqueue(stream, "a host function", [=] { call(data); }));
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{flags, thread().device});
  return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }

// Not freed, as a stream.
API cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) {
  Lock lock;
  if (auto error = legacy(stream)) return remember(error);
  Event* event = event_of(handle);
  Stream* own = stream_of(stream);
  int device = own ? own->device : thread().device;
  if (event->device != device) {
    note("violation", "an event of device %d is recorded on a stream of device %d", event->device,
         device);
    return remember(cudaErrorInvalidResourceHandle);
  }
  event->capture = capture_of(stream);
  event->from = event->capture ? own : nullptr;
  event->version = event->capture ? own->version : 0;
  event->recorded = true;
  event->time = milliseconds();
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

API cudaError_t cudaEventQuery(cudaEvent_t event) {
  Lock lock;
  if (captured(event_of(event))) {
    return breaks(event_of(event)->capture, "cudaEventQuery", cudaErrorCapturedEvent);
  }
  return remember(may_synchronize("cudaEventQuery"));
}

API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Lock lock;
  if (captured(event_of(event))) {
    return breaks(event_of(event)->capture, "cudaEventSynchronize", cudaErrorCapturedEvent);
  }
  return remember(may_synchronize("cudaEventSynchronize"));
}

API cudaError_t cudaEventElapsedTime(float* elapsed, cudaEvent_t begin, cudaEvent_t end) {
  Event *from = event_of(begin), *to = event_of(end);
  bool timed = !((from->flags | to->flags) & cudaEventDisableTiming);
  if (!from->recorded || !to->recorded || !timed) return remember(cudaErrorInvalidResourceHandle);
  // The host's time, and never nothing, since callers divide by it.
  *elapsed = static_cast<float>(std::max(to->time - from->time, 0.001));
  return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
  Lock lock;
  Event* event = event_of(handle);
  Stream* own = stream_of(stream);
  if (!captured(event)) return cudaSuccess;
  if (!own) return breaks(event->capture, "a wait", cudaErrorStreamCaptureImplicit);
  if (!own->capture) {
    own->capture = event->capture;
    own->capture->streams.insert(own);
    own->version = 1;
    own->joined = 0;
  }
  if (event->from != own) event->from->joined = std::max(event->from->joined, event->version);
  return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread().mode);
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                              const cudaGraphNode_t*, const cudaGraphEdgeData*,
                                              size_t, cudaStreamCaptureMode mode) {
  Lock lock;
  static unsigned long long id = 0;
  Stream* own = stream_of(stream);
  if (!own) return remember(cudaErrorStreamCaptureUnsupported);
  if (own->capture) return remember(cudaErrorIllegalState);
  auto* into = graph ? reinterpret_cast<Graph*>(graph) : new Graph;
  own->capture = new Capture{mode, ++id, into, own, thread_id(), {own}};
  state().captures.insert(own->capture);
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return cudaStreamBeginCaptureToGraph(stream, nullptr, nullptr, nullptr, 0, mode);
}

API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  Lock lock;
  *graph = nullptr;
  Capture* capture = capture_of(stream);
  if (!capture) return remember(cudaErrorIllegalState);
  bool open = false;
  for (auto* own : capture->streams) {
    open = open || (own != capture->origin && own->version > own->joined);
    own->capture = nullptr;
  }
  state().captures.erase(capture);
  if (capture->broken) return remember(cudaErrorStreamCaptureInvalidated);
  if (open) return remember(cudaErrorStreamCaptureUnjoined);
  *graph = reinterpret_cast<cudaGraph_t>(capture->graph);
  return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* said) {
  Lock lock;
  if (auto error = legacy(stream)) return remember(error);
  *said = status(capture_of(stream));
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* said,
                                         unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** nodes,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  Lock lock;
  Capture* capture = capture_of(stream);
  *said = status(capture);
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  auto& own = reinterpret_cast<Graph*>(graph)->nodes;
  for (size_t i = 0; nodes && i < *count && i < own.size(); ++i) {
    nodes[i] = reinterpret_cast<cudaGraphNode_t>(&own[i]);
  }
  *count = own.size();
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                              unsigned long long) {
  if (!graph) return remember(cudaErrorInvalidValue);
  *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph,
                                     unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(made, graph, flags);
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t made, cudaStream_t stream) {
  Lock lock;
  if (auto error = legacy(stream)) return remember(error);
  for (auto& run : reinterpret_cast<Graph*>(made)->nodes) run();
  return cudaSuccess;
}

API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
