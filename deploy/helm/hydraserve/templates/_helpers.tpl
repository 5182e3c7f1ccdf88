{{- define "hydraserve.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "hydraserve.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "hydraserve.labels" -}}
{{ include "hydraserve.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "hydraserve.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository .Values.image.tag -}}
{{- end -}}
{{- end -}}

{{- define "hydraserve.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "hydraserve.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- /* Flags that all pods of a server share: nodes of one group must be given the same ones. */ -}}
{{- define "hydraserve.args" -}}
- --model
- {{ .Values.model | quote }}
- --port
- "8000"
- --slots
- {{ .Values.adapters.slots | quote }}
- --max-adapters
- {{ .Values.adapters.maxAdapters | quote }}
- --max-rank
- {{ .Values.adapters.maxRank | quote }}
- --max-heads
- {{ .Values.adapters.maxHeads | quote }}
- --max-queued-requests
- {{ .Values.queue.maxRequests | quote }}
- --shutdown-timeout
- {{ .Values.drainSeconds | quote }}
{{- if .Values.adapters.volume }}
- --adapter-dir
- /adapters
{{- end }}
{{- range .Values.adapters.allowSources }}
- --allow-source
- {{ . | quote }}
{{- end }}
{{- if .Values.kvCacheBytes }}
- --kv-cache-memory-bytes
- {{ .Values.kvCacheBytes | int64 | quote }}
{{- end }}
{{- end -}}

{{- /* What a pod has besides its container's arguments and probes. */ -}}
{{- define "hydraserve.pod" -}}
serviceAccountName: {{ include "hydraserve.serviceAccountName" . }}
automountServiceAccountToken: false
terminationGracePeriodSeconds: {{ add .Values.preStopSeconds .Values.drainSeconds 15 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile:
    type: RuntimeDefault
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  - name: shared-memory
    emptyDir:
      medium: Memory
      sizeLimit: {{ .Values.sharedMemory }}
  - name: cache
    {{- if .Values.cache.existingClaim }}
    persistentVolumeClaim:
      claimName: {{ .Values.cache.existingClaim }}
    {{- else }}
    emptyDir:
      sizeLimit: {{ .Values.cache.sizeLimit }}
    {{- end }}
  {{- with .Values.adapters.volume }}
  - name: adapters
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .Values.multiNode.enabled }}
  - name: state
    persistentVolumeClaim:
      claimName: {{ .Values.multiNode.sharedClaim }}
  {{- end }}
  {{- with .Values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* Of one pod. A node of a group computes on all its GPUs, so it has to have as many as its ranks. */ -}}
{{- define "hydraserve.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.multiNode.enabled -}}
{{- $resources = mergeOverwrite $resources (dict "limits" (dict "nvidia.com/gpu" (int .Values.multiNode.gpusPerNode))) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "hydraserve.container" -}}
name: hydraserve
image: {{ include "hydraserve.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- with .Values.envFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- include "hydraserve.resources" . | nindent 2 }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
  - name: shared-memory
    mountPath: /dev/shm
  - name: cache
    mountPath: /var/cache/hydraserve
  {{- if .Values.adapters.volume }}
  - name: adapters
    mountPath: /adapters
    readOnly: true
  {{- end }}
  {{- if .Values.multiNode.enabled }}
  - name: state
    mountPath: /var/lib/hydraserve/state
  {{- end }}
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "hydraserve.env" -}}
{{- range $key := list "VLLM_API_KEY" "HYDRASERVE_ADMIN_API_KEY" }}
{{- if $.Values.existingSecret }}
- name: {{ $key }}
  valueFrom:
    secretKeyRef:
      name: {{ $.Values.existingSecret }}
      key: {{ $key }}
      optional: true
{{- end }}
{{- end }}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Of the container that answers HTTP. Alive: the engine runs. Ready: it takes requests. */ -}}
{{- define "hydraserve.serving" -}}
ports:
  - name: http
    containerPort: 8000
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  failureThreshold: {{ mul .Values.probes.startupMinutes 6 }}
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /ready, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ .Values.preStopSeconds | quote }}]
{{- end -}}
