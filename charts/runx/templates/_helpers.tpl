{{- define "runx.labels" -}}
{{ include "runx.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: runx
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "runx.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* The name of the installer's objects. Those of the cluster have the namespace in it, so that those of two releases do not meet. Their
     installers do on a node, which has one runx: see that their nodeSelectors do not. */}}
{{- define "runx.installer" -}}
{{ printf "%s-node" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "runx.clusterWide" -}}
{{ printf "%s-%s-node" .Release.Namespace .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "runx.image" -}}
{{- with .Values.installer.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end }}
{{- end }}

{{- /* Directories of the node by distribution: name, path, type, whether they are only read, and whether mounts in them come
     and go here, too: else a container's file systems would stay mounted in the installer's pod after it. */}}
{{- define "runx.mounts" -}}
{{- $rancher := printf "/var/lib/rancher/%s" .Values.installer.distribution -}}
- {name: programs, path: {{ .Values.installer.installDir }}, type: DirectoryOrCreate}
- {name: state, path: /var/lib/runx, type: DirectoryOrCreate}
{{- /* The socket /run/systemd/private is another one after systemd has executed itself again. */}}
- {name: systemd, path: /run/systemd, type: Directory, readOnly: true}
- {name: os-release, path: /etc/os-release, type: File, readOnly: true}
{{- if or (eq .Values.installer.distribution "k3s") (eq .Values.installer.distribution "rke2") }}
- {name: containerd-config, path: {{ $rancher }}/agent/etc/containerd, type: Directory}
{{- /* That of rke2 is a link to the version that is current, which the kubelet follows. */}}
- {name: containerd-programs, path: {{ $rancher }}/{{ eq .Values.installer.distribution "rke2" | ternary "bin" "data" }}, type: Directory, readOnly: true}
- {name: containerd, path: /run/k3s, type: Directory, readOnly: true, propagation: HostToContainer}
- {name: containers, path: /run/containerd, type: DirectoryOrCreate, readOnly: true, propagation: HostToContainer}
{{- else if eq .Values.installer.distribution "k0s" }}
- {name: containerd-config, path: /etc/k0s, type: Directory}
- {name: containerd-programs, path: /var/lib/k0s/bin, type: Directory, readOnly: true}
- {name: containerd, path: /run/k0s, type: Directory, readOnly: true, propagation: HostToContainer}
- {name: containers, path: /run/containerd, type: DirectoryOrCreate, readOnly: true, propagation: HostToContainer}
{{- else }}
- {name: containerd-config, path: /etc/containerd, type: Directory}
- {name: usr-bin, path: /usr/bin, type: Directory, readOnly: true}
- {name: usr-local-bin, path: /usr/local/bin, type: Directory, readOnly: true}
- {name: containerd, path: /run/containerd, type: Directory, readOnly: true, propagation: HostToContainer}
{{- if eq .Values.installer.distribution "kind" }}
- {name: kind, path: /kind, type: Directory, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- /* The annotations of what is there for a hook alone. What failed stays, for its log. */}}
{{- define "runx.hook" -}}
helm.sh/hook: post-upgrade,post-rollback
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{- /* A pod of `helm test`: root, kind, image, script and annotations. */}}
{{- define "runx.testPod" -}}
apiVersion: v1
kind: Pod
metadata:
  name: {{ .root.Release.Name }}-test-{{ .kind }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "runx.labels" .root | nindent 4 }}
    app.kubernetes.io/component: test
  annotations:
    helm.sh/hook: test
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
    {{- with .annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  runtimeClassName: {{ .root.Values.runtimeClass.name }}
  restartPolicy: Never
  automountServiceAccountToken: false
  # The nodes may be installed just now.
  activeDeadlineSeconds: 300
  containers:
    - name: test
      image: {{ .image | quote }}
      imagePullPolicy: {{ .root.Values.tests.pullPolicy }}
      {{- with .script }}
      command: [sh, -c, {{ . | quote }}]
      {{- end }}
      resources:
        requests: {cpu: 10m, memory: 16Mi}
        limits: {memory: 128Mi}
      securityContext:
        allowPrivilegeEscalation: false
        runAsNonRoot: true
        runAsUser: 65534
        capabilities:
          drop: [ALL]
        seccompProfile:
          type: RuntimeDefault
{{- end }}
