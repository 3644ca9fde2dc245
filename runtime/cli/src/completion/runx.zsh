#compdef runx
# Completion of runx for zsh: "runx completion zsh" prints this.
_runx() {
    local kind value about current found=1
    local -a described
    while IFS=$'\t' read -r kind value about; do
        case $kind in
        lead) compset -P "${(b)value}" ;;
        word) described+=("${value//:/\\:}${about:+:$about}") ;;
        files) _files && found=0 ;;
        directories) _files -/ && found=0 ;;
        programs) _command_names -e && found=0 ;;
        esac
    done < <("${words[1]}" __complete zsh "${(@Q)words[2,CURRENT]}" 2>/dev/null)
    (( ${#described} )) && _describe -t runx 'runx' described && found=0
    return found
}
if [[ ${funcstack[1]} == _runx ]]; then
    _runx "$@"
else
    compdef _runx runx
fi
